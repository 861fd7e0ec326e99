"""Writes a checkpoint in Hugging Face layout as a GGUF file for llama.cpp, in bfloat16 or float16, without quantisation.

Benchmarks send token ids, so the vocabulary is made up and only has the right size. For Llama and Mistral, llama.cpp wants the
rows of the query and key projections in pairs (x0, x_half, x1, ...), as in Llama's original layout; Qwen's stay as they are.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # names in gguf.MODEL_ARCH
_TYPES = {"bfloat16": ("BF16", "MOSTLY_BF16"), "float16": ("F16", "MOSTLY_F16"), "float32": ("F32", "ALL_F32")}


def write_gguf(directory: pathlib.Path, path: pathlib.Path, dtype: str) -> None:
    """Writes the checkpoint in `directory` as the file `path`; vectors stay float32.

    Raises:
      ValueError: if the model's family or its kind of rope cannot be written here.
      ImportError: if the package gguf is not installed.
    """
    import gguf  # type: ignore[import-not-found]

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model_type={kind!r} has no GGUF layout here: use one of {', '.join(_ARCHITECTURES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not written to GGUF here: compare without llama_cpp")
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    matrices, whole_file = _TYPES[dtype]
    writer.add_file_type(gguf.LlamaFileType[whole_file])
    _add_hyperparameters(writer, config, rope)
    _add_vocabulary(writer, config["vocab_size"], gguf.TokenType)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in stored_tensors(directory):
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        if _ARCHITECTURES[kind] == "LLAMA":
            tensor = paired(name, tensor, config)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"tensor {name!r} has no name in GGUF")
        stored = gguf.GGMLQuantizationType[matrices if tensor.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: Any, config: dict[str, Any], rope: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))


def _add_vocabulary(writer: Any, size: int, token_type: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"t{n}" for n in range(size))]
    special = [token_type.UNKNOWN, token_type.CONTROL, token_type.CONTROL, *[token_type.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens[:size])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*special, *[token_type.NORMAL] * size][:size])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def stored_tensors(directory: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and values as float32; parses the file itself, because safetensors has no bfloat16 for NumPy."""
    for path in sorted(directory.glob("*.safetensors")):
        stored = np.memmap(path, np.uint8, "r")
        size = int(stored[:8].view(np.uint64)[0])
        for name, entry in json.loads(stored[8 : 8 + size].tobytes()).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, _float32(stored[8 + size + start : 8 + size + end], entry["dtype"]).reshape(entry["shape"])


def _float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def paired(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Returns the rows of each head in the order (0, half, 1, half + 1, ...); other tensors as they are."""
    heads = config["num_attention_heads"]
    if ".q_proj." in name:
        count = heads
    elif ".k_proj." in name:
        count = config.get("num_key_value_heads", heads)
    else:
        return tensor
    split = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)
