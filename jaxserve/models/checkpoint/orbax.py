"""Orbax checkpoints of a model: a directory with the parameters and the config of their model."""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.checkpoint.tensor_files import CheckpointError
from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.params import Placement, abstract_params, check_params, leaves_with_paths, shardings_of

_CONFIG, _PARAMS = "model_config.json", "params"


def save_orbax(params: nnx.State, config: ModelConfig, directory: str | os.PathLike[str]) -> None:
    """Writes a directory that `load_orbax` reads. The directory appears under its name only when it is complete.

    Args:
      params: parameters that are not prepared, in the form of `nnx.split(Transformer(config))[1]`.
      config: the model of the parameters.
      directory: must not exist, or must be empty.

    Raises:
      ValueError: if `params` are not those of `config`, or `directory` is not empty.
    """
    import orbax.checkpoint as ocp

    check_params(params, config)
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists already: choose another directory or remove it")
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / _PARAMS, {_name(path): leaf for path, leaf in leaves_with_paths(params)})
        (unfinished / _CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_orbax(
    directory: str | os.PathLike[str], dtype: Any = None, sharding: Placement = None
) -> tuple[nnx.State, ModelConfig]:
    """Returns the parameters and the config that `save_orbax` wrote.

    Args:
      directory: the checkpoint.
      dtype: dtype of the parameters; None: the stored dtype.
      sharding: where the parameters go; see `Placement`.

    Raises:
      CheckpointError: if the directory is not such a checkpoint, is damaged, or its parameters do not fit its config.
    """
    import orbax.checkpoint as ocp

    directory = pathlib.Path(directory).absolute()
    config = _read_config(directory / _CONFIG)
    abstract = abstract_params(config, jnp.float32 if dtype is None else dtype)
    leaves = {_name(path): leaf for path, leaf in leaves_with_paths(abstract)}
    default_sharding = jnp.zeros(()).sharding
    placements = dict(zip(leaves, shardings_of(sharding, abstract), strict=True))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(directory / _PARAMS).item_metadata.tree
            _check_shapes(leaves, stored, directory)
            targets = {
                name: jax.ShapeDtypeStruct(
                    leaf.shape,
                    stored[name].dtype if dtype is None else leaf.dtype,
                    sharding=placements[name] or default_sharding,
                )
                for name, leaf in leaves.items()
            }
            arrays = checkpointer.restore(directory / _PARAMS, targets)
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise exceptions of many kinds for damaged files
            raise CheckpointError(
                f"{directory / _PARAMS} cannot be read ({type(error).__name__}): restore the checkpoint from a copy"
            ) from error
    for name, array in arrays.items():
        if array.dtype == jnp.float16 != stored[name].dtype and not jnp.isfinite(array).all():
            raise CheckpointError(
                f"parameter {name} in {directory} has values that float16 cannot hold: use bfloat16 or float32"
            )
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in leaves]), config


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _read_config(path: pathlib.Path) -> ModelConfig:
    try:
        fields = json.loads(path.read_bytes())
        rope = RopeConfig(**fields.pop("rope"))
        return ModelConfig(rope=rope, windows=tuple(fields.pop("windows")), **fields)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give a directory written by save_orbax") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a model ({error}): restore it from a copy") from None


def _check_shapes(leaves: dict[str, Any], stored: dict[str, Any], directory: pathlib.Path) -> None:
    for name in sorted(leaves.keys() | stored.keys()):
        want = tuple(leaves[name].shape) if name in leaves else None
        have = tuple(stored[name].shape) if name in stored else None
        if want != have:
            raise CheckpointError(
                f"parameter {name} in {directory} has shape {have} but its {_CONFIG} makes it {want}: "
                "restore both files from a copy"
            )
