"""Hugging Face checkpoints: found, loaded straight from safetensors into our layout, and saved."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.models.checkpoint.layout import Fusion, fusion_of
from jaxserve.models.checkpoint.tensor_files import (
    SINGLE_FILE,
    CheckpointError,
    StoredTensor,
    cast,
    open_tensors,
    write_tensors,
)
from jaxserve.models.config import ModelConfig
from jaxserve.models.families.hugging_face import read_model_config, to_hugging_face
from jaxserve.models.params import (
    Placement,
    abstract_params,
    check_params,
    leaves_with_paths,
    shardings_of,
    weight_dtype,
)

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # old checkpoints store what rope_theta determines
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_FILES_TO_SKIP = [
    "*/*",
    "consolidated*",
]  # exports to other formats, and Mistral's second copy of the weights


def load_hugging_face(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    *,
    dtype: Any,
    sharding: Placement = None,
) -> nnx.State:
    """The parameters of a checkpoint, as of `nnx.split(Transformer(config, dtype=dtype))[1]`.

    One leaf at a time is read, cast, fused and put on the device, so that the host never holds a second copy of the
    model. Nothing but JSON and safetensors is opened, and no code of the checkpoint is run.

    Args:
      directory: holds `model.safetensors`, or files with `model.safetensors.index.json`, and `config.json`.
      config: the model; None: what `config.json` says.
      dtype: of the parameters, whatever dtype is stored: float32, bfloat16 or float16.
      sharding: where the parameters go; see `Placement`.

    Raises:
      CheckpointError: if the files are missing or damaged, or their tensors are not those of the model.
      ValueError: if config.json is missing or describes a model that is not supported.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the directory of a Hugging Face checkpoint")
    if config is None:
        config = read_model_config(directory)
    abstract = abstract_params(config, dtype)
    leaves = [(fusion_of(path, config), leaf) for path, leaf in leaves_with_paths(abstract)]
    shardings = shardings_of(sharding, abstract)
    with open_tensors(directory) as stored:
        _check_tensors(stored, [fusion for fusion, _ in leaves], config, directory)
        arrays = [_load_leaf(stored, *leaf, place) for leaf, place in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _load_leaf(stored: Mapping[str, StoredTensor], fusion: Fusion, leaf: jax.ShapeDtypeStruct, place: Any) -> jax.Array:
    tensors = [cast(stored[name].read(), leaf.dtype, name) for name in fusion.names]
    # A buffer that aliased numpy memory could not be donated. Waiting bounds the number of host buffers in flight.
    return jax.device_put(fusion.fuse(tensors, leaf.shape), place, may_alias=False).block_until_ready()


def _check_tensors(
    stored: Mapping[str, StoredTensor], fusions: list[Fusion], config: ModelConfig, directory: pathlib.Path
) -> None:
    expected = {name: shape for fusion in fusions for name, shape in fusion.shapes.items()}
    missing = [name for name in expected if name not in stored]
    if missing == [_LM_HEAD]:
        raise CheckpointError(
            f"{directory} has no tensor {_LM_HEAD}: set tie_word_embeddings to true if the embedding is its output "
            "projection, else download it again"
        )
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} tensor(s), the first being {missing[0]}: download it again, or use the "
            "config.json of this checkpoint"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"tensor {name} in {stored[name].file} has shape {list(stored[name].shape)} but the config makes it "
                f"{list(shape)}: use the config.json of this checkpoint"
            )
    extra = [name for name in stored if name not in expected and not _DERIVED.fullmatch(name)]
    if config.tied_embeddings and _LM_HEAD in extra:
        _check_tied(stored)
        extra.remove(_LM_HEAD)
    if extra:
        raise CheckpointError(
            f"{directory} has {len(extra)} tensor(s) for which this {config.family} model has no place, the first "
            f"being {extra[0]}: use the config.json of this checkpoint"
        )


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    head, embedding = stored[_LM_HEAD], stored[_EMBEDDING]
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"tensor {_LM_HEAD} in {head.file} differs from {_EMBEDDING} although tie_word_embeddings is true: "
            "set tie_word_embeddings to false in config.json to use it"
        )


def save_hugging_face(
    params: nnx.State,
    config: ModelConfig,
    directory: str | os.PathLike[str],
    dtype: Any,
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors`, which transformers and `load_hugging_face` load.

    Args:
      params: unprepared parameters, as of `nnx.split(Transformer(config))[1]`.
      config: their model.
      directory: made where it is missing; files of the same names are replaced.
      dtype: of the tensors in the file: float32, bfloat16 or float16.
      extra_config: further keys of config.json that are not the model's own, such as eos_token_id.

    Raises:
      ValueError: if `params` are not those of `config`, or the family's checkpoints cannot express `config`.
      CheckpointError: if a value does not fit in `dtype`.
    """
    check_params(params, config)
    dtype = weight_dtype(dtype)
    token_ids: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": None,
    }  # or transformers supplies Llama 2's
    mapping = to_hugging_face(config)
    clash = sorted(mapping.keys() & (extra_config or {}).keys())
    if clash:
        raise ValueError(f"extra_config must not give {clash[0]!r}: it follows from the model's config")
    mapping |= token_ids | {"torch_dtype": str(dtype)} | dict(extra_config or {})
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    leaves = [(fusion_of(path, config), leaf) for path, leaf in leaves_with_paths(params)]
    shapes = {name: shape for fusion, _ in leaves for name, shape in fusion.shapes.items()}
    tensors = (
        cast(tensor, dtype, name)
        for fusion, leaf in leaves
        for name, tensor in zip(fusion.names, fusion.split(np.asarray(leaf)), strict=True)
    )
    write_tensors(directory / SINGLE_FILE, shapes, dtype, tensors)
    (directory / "config.json").write_text(json.dumps(mapping, indent=2) + "\n")


def resolve_model(path_or_id: str) -> pathlib.Path:
    """The directory of a checkpoint: `path_or_id` itself, or a download of the Hugging Face hub's "org/name".

    Only JSON, safetensors and tokenizer files are downloaded: neither pickles nor code.

    Raises:
      CheckpointError: if it is neither a directory nor a hub id, or the hub cannot provide it.
    """
    path = pathlib.Path(path_or_id)
    if path_or_id and path.is_dir():
        return path
    if path_or_id and path.exists():
        raise CheckpointError(f"model {path_or_id!r} is a file: give the directory that holds it")
    if not _HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(
            f"model {path_or_id!r} is neither a directory nor a Hugging Face hub id: give an existing directory or "
            'an id such as "HuggingFaceTB/SmolLM2-135M"'
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            path_or_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_TO_SKIP
        )
    except errors.GatedRepoError:
        why = "the hub asks for its licence to be accepted: accept it on its page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or it is private: correct the id, or log in with `hf auth login`"
    except Exception as error:  # network libraries each raise their own
        why = f"the download failed ({type(error).__name__}): check the network, or give a directory"
    else:
        return pathlib.Path(found)
    raise CheckpointError(f"model {path_or_id!r} is not a directory here, and {why}")
