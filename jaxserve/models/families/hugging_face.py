"""Which Hugging Face model families run here, and what their config.json means.

A field that changes the computation is honoured or refused by name. A checkpoint's config.json carries many others,
which are ignored; in a `configs/` file of ours (`strict`) an unknown key is an error.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.families.fields import COUNT, FLAG, NAME, NAMES, NON_NEGATIVE, SIZE, read, require, short
from jaxserve.models.families.rope_blocks import read_rope, write_rope


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` implies; the defaults are those of the transformers class.

    Attributes:
      architecture: name of the transformers class with the language model head.
      attention_bias: whether attention projections have a bias: "never", "qkv" (always, without out) or "field".
      mlp_bias: whether the field `mlp_bias` is honoured.
      window: "never", "all" layers (`sliding_window`) or "some" (`use_sliding_window`, `layer_types`).
      qk_norm: whether queries and keys are normalised.
      num_kv_heads: default of `num_key_value_heads`; None: as many as query heads.
      head_dim: default of `head_dim`; None: hidden_size / num_attention_heads.
      max_position: default of `max_position_embeddings`.
    """

    architecture: str
    attention_bias: str
    mlp_bias: bool
    window: str
    qk_norm: bool
    num_kv_heads: int | None
    head_dim: int | None
    max_position: int


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "field", True, "never", False, None, None, 2048),
    "mistral": Family("MistralForCausalLM", "never", False, "all", False, 8, None, 131072),
    "qwen2": Family("Qwen2ForCausalLM", "qkv", False, "some", False, 32, None, 32768),
    "qwen3": Family("Qwen3ForCausalLM", "field", False, "some", True, 32, 128, 32768),
}

_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings",
}  # fmt: skip
# Settings of training, generation and storage, which are not the model's.
_IRRELEVANT = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "initializer_range", "use_cache",
    "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Fields that would change the computation, with the values (null aside) at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (),
    "compression_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "use_qk_norm": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}


def from_hugging_face(mapping: Mapping[str, Any], *, strict: bool = False) -> ModelConfig:
    """The model that the contents of a Hugging Face config.json describe.

    Args:
      mapping: the parsed JSON object, of transformers 4 or 5.
      strict: whether a key without meaning here is an error.

    Raises:
      ValueError: if the model is not supported, or a field is missing, unknown (`strict`) or of the wrong type.
    """
    name = require(mapping, "model_type", NAME)
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse_what_is_not_supported(mapping, family)
    if strict:
        _refuse_unknown_keys(mapping)
    num_layers, num_heads = (
        require(mapping, "num_hidden_layers", SIZE),
        require(mapping, "num_attention_heads", SIZE),
    )
    max_position = read(mapping, "max_position_embeddings", SIZE) or family.max_position
    eps = read(mapping, "rms_norm_eps", NON_NEGATIVE, default=1e-6)
    biases = _read_biases(mapping, name, family)
    return ModelConfig(
        family=name,
        vocab_size=require(mapping, "vocab_size", SIZE),
        embed_dim=require(mapping, "hidden_size", SIZE),
        ffw_dim=require(mapping, "intermediate_size", SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read(mapping, "num_key_value_heads", SIZE, default=family.num_kv_heads) or num_heads,
        head_dim=read(mapping, "head_dim", SIZE, default=family.head_dim) or _default_head_dim(mapping, num_heads),
        norm_eps=1e-6 if eps is None else float(eps),
        rope=read_rope(mapping, max_position),
        windows=_read_windows(mapping, name, family, num_layers),
        tied_embeddings=bool(read(mapping, "tie_word_embeddings", FLAG)),
        qk_norm=family.qk_norm,
        max_position=max_position,
        **biases,
    )


def _refuse_what_is_not_supported(mapping: Mapping[str, Any], family: Family) -> None:
    architectures = read(mapping, "architectures", NAMES) or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(
            f"architectures={short(architectures)} is not supported for model_type "
            f"{mapping['model_type']!r}: use a checkpoint of {family.architecture}"
        )
    for key, neutral in _NEUTRAL.items():
        value = mapping.get(key)
        if value is not None and value not in neutral:
            way_out = f"only {neutral[0]!r} is" if neutral else "use a checkpoint without it"
            raise ValueError(f"{key}={short(value)} is not supported: {way_out}")


def _refuse_unknown_keys(mapping: Mapping[str, Any]) -> None:
    known = _READ | _IRRELEVANT | _NEUTRAL.keys()
    for key in sorted(mapping.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        way_out = f"did you mean {close[0]!r}" if close else "remove it"
        raise ValueError(f"unknown key {key!r}: {way_out}")


def _default_head_dim(mapping: Mapping[str, Any], num_heads: int) -> int:
    hidden = require(mapping, "hidden_size", SIZE)
    if hidden % num_heads:
        raise ValueError(f"hidden_size={hidden} is no multiple of num_attention_heads={num_heads}: give head_dim")
    return hidden // num_heads


def _read_biases(mapping: Mapping[str, Any], name: str, family: Family) -> dict[str, bool]:
    attention, ffw = read(mapping, "attention_bias", FLAG), read(mapping, "mlp_bias", FLAG)
    fixed = {"never": False, "qkv": True}.get(family.attention_bias)
    if fixed is not None and attention not in (None, fixed):
        raise ValueError(f"attention_bias={attention} is not supported for model_type {name!r}: it is always {fixed}")
    if ffw and not family.mlp_bias:
        raise ValueError(f"mlp_bias={ffw} is not supported for model_type {name!r}: it is always False")
    qkv = bool(attention) if fixed is None else fixed
    return {"qkv_bias": qkv, "out_bias": qkv and family.attention_bias == "field", "ffw_bias": bool(ffw)}


def _read_windows(mapping: Mapping[str, Any], name: str, family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = read(mapping, "sliding_window", SIZE, default=None if family.window == "never" else 4096)
    enabled = read(mapping, "use_sliding_window", FLAG)
    first = read(mapping, "max_window_layers", COUNT, default=28) if family.window == "some" else 0
    if family.window == "some" and not enabled:
        window = None
    if window is not None and family.window == "never":
        raise ValueError(f"sliding_window={window} is not supported for model_type {name!r}: it must be null")
    if window is not None and enabled is False:
        raise ValueError(f"sliding_window={window} contradicts use_sliding_window=False: make sliding_window null")
    implied = [
        "sliding_attention" if window is not None and layer >= (first or 0) else "full_attention"
        for layer in range(num_layers)
    ]
    types = read(mapping, "layer_types", NAMES) or implied
    if len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries but num_hidden_layers={num_layers}: give one per layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer type {kind!r} is not supported: use full_attention or sliding_attention")
    if types != implied and (family.window != "some" or window is None):
        raise ValueError(
            f"layer_types={short(types)} contradicts the sliding window of model_type {name!r}, which is "
            f"{window}: remove layer_types or correct sliding_window and use_sliding_window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json that transformers 4 and 5 load and `from_hugging_face` reads back as `config`.

    Raises:
      ValueError: if `config` has parts which its family's checkpoints cannot express.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    mapping: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tied_embeddings,
        **write_rope(config.rope),
    }
    if family.attention_bias == "field":
        mapping["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        mapping["mlp_bias"] = config.ffw_bias
    if family.window != "never":
        mapping |= _write_windows(config, family)
    if from_hugging_face(mapping, strict=True) != config:
        raise ValueError(
            f"a checkpoint of family {config.family!r} cannot express this model's biases, q and k norms, windows or "
            f"rotary embedding: choose the family that has them, or save with save_orbax ({config})"
        )
    return mapping


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    window = next((window for window in config.windows if window is not None), None)
    if family.window == "all":
        return {"sliding_window": window}
    types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    num_leading = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), config.num_layers)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": num_leading,
        "layer_types": types,
    }


def read_model_config(path: str | pathlib.Path, *, strict: bool = False) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      path: the file, or the directory that holds it as `config.json`.
      strict: whether a key without meaning here is an error.

    Raises:
      ValueError: if the file is missing, not JSON, or refused by `from_hugging_face`; the message names the file.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        mapping = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: give a Hugging Face config.json, or the directory of a checkpoint that holds one"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it or download it again") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{file} holds a JSON {type(mapping).__name__}: it must be an object of model settings")
    try:
        return from_hugging_face(mapping, strict=strict)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
