"""Hugging Face checkpoints: loaded straight from safetensors into our layout, and saved."""

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


def load_hugging_face(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    *,
    dtype: Any,
    sharding: Placement = None,
) -> nnx.State:
    """Returns the parameters of a checkpoint, in the form of `nnx.split(Transformer(config, dtype=dtype))[1]`.

    They are read, cast, fused and put on the device one leaf at a time, so that the host never holds a second copy of the
    model. Only JSON and safetensors files are opened, and no code of the checkpoint is run.

    Args:
      directory: holds `model.safetensors`, or files with `model.safetensors.index.json`, and `config.json`.
      config: the model; None: what `config.json` says.
      dtype: dtype of the parameters: float32, bfloat16 or float16. The stored dtype may be another.
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
    # A buffer that aliases numpy memory cannot be donated. Waiting bounds the number of host buffers in flight.
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
      params: parameters that are not prepared, in the form of `nnx.split(Transformer(config))[1]`.
      config: the model of the parameters.
      directory: is made if it is missing; files of the same names are replaced.
      dtype: dtype of the tensors in the file: float32, bfloat16 or float16.
      extra_config: further keys of config.json that do not describe the model, such as eos_token_id.

    Raises:
      ValueError: if `params` are not those of `config`, or the family's checkpoints cannot express `config`.
      CheckpointError: if a value does not fit in `dtype`.
    """
    check_params(params, config)
    dtype = weight_dtype(dtype)
    token_ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # otherwise transformers uses Llama 2's
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
