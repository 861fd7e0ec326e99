"""The parameters of a model as a pytree: shapes, placement on devices, and random values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Sharding

from jaxserve.models.config import ModelConfig
from jaxserve.models.transformer import Transformer

Path = tuple[str | int, ...]
Placement = Sharding | Callable[[Path, jax.ShapeDtypeStruct], Sharding | None] | Any | None
"""Where parameters go: None (the default device), one sharding for all, a function of a leaf's path and shape, or a pytree of
shardings that has the structure of the parameters or of a prefix of it."""


def abstract_params(config: ModelConfig, dtype: Any) -> nnx.State:
    """Returns `nnx.split(Transformer(config, dtype=dtype))[1]` with shapes in place of arrays. It is shared: do not change it.

    Raises:
      ValueError: if `dtype` is not float32, bfloat16 or float16.
    """
    return _abstract_params(config, weight_dtype(dtype))


@functools.cache
def _abstract_params(config: ModelConfig, dtype: Any) -> nnx.State:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype)))[1]


def weight_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype`, or the dtype of that name, as a numpy dtype.

    Raises:
      ValueError: if it is not float32, bfloat16 or float16.
    """
    for supported in (jnp.float32, jnp.bfloat16, jnp.float16):
        if dtype == supported or dtype == supported.dtype.name:
            return supported.dtype
    raise ValueError(f"dtype={dtype!r} is not supported for weights: use float32, bfloat16 or float16")


def leaves_with_paths(params: nnx.State) -> list[tuple[Path, Any]]:
    """Returns every leaf in the order of `jax.tree.leaves`, with its path, such as ("blocks", 0, "attention", "qkv")."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return [(tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey)), leaf) for keys, leaf in leaves]


def check_params(params: nnx.State, config: ModelConfig) -> None:
    """Raises ValueError unless `params` has the structure and shapes of a model of this config."""
    expected, actual = leaves_with_paths(abstract_params(config, jnp.float32)), leaves_with_paths(params)
    expected_shapes, shapes = ({path: leaf.shape for path, leaf in leaves} for leaves in (expected, actual))
    for path in sorted(expected_shapes.keys() | shapes.keys(), key=str):
        want, have = expected_shapes.get(path), shapes.get(path)
        if want == have:
            continue
        name = ".".join(map(str, path))
        if have is None:
            raise ValueError(f"parameter {name} of shape {want} is missing: pass the config of these parameters")
        rule = "has no such parameter" if want is None else f"makes it {want}"
        raise ValueError(
            f"parameter {name} has shape {have} but a model of this config {rule}: pass the config of these parameters"
        )


def shardings_of(placement: Placement, params: nnx.State) -> list[Any]:
    """Returns the sharding of every leaf, in the order of `jax.tree.leaves`; None: the default device."""
    leaves = leaves_with_paths(params)
    if placement is None:
        return [None] * len(leaves)
    if callable(placement):
        return [placement(path, leaf) for path, leaf in leaves]
    return jax.tree.leaves(jax.tree.broadcast(placement, params))


def random_params(config: ModelConfig, seed: int, dtype: Any, *, sharding: Placement = None) -> nnx.State:
    """Returns random parameters for measurements of speed, made leaf by leaf, each in `dtype` from the start.

    Scales are one and biases zero. Matrices are uniform, with the standard deviation 0.02 of a new `Transformer`. To be quick
    they repeat one sequence of a million draws; its prime length keeps the rows of a matrix, and layers, from being equal.

    Args:
      config: the model.
      seed: seed of the draws.
      dtype: float32, bfloat16 or float16.
      sharding: where the parameters go; see `Placement`.
    """
    abstract = abstract_params(config, dtype)
    bound, period = 0.02 * 3**0.5, 1_000_003
    draws = jax.random.uniform(jax.random.key(seed), (period,), weight_dtype(dtype), -bound, bound)
    leaves, start = [], 0
    for (path, leaf), place in zip(leaves_with_paths(abstract), shardings_of(sharding, abstract), strict=True):
        if path[-1] == "scale":
            array = jnp.ones(leaf.shape, leaf.dtype)
        elif str(path[-1]).endswith("bias"):
            array = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            repeated = jnp.tile(draws, leaf.size // period + 2)
            array = lax.dynamic_slice_in_dim(repeated, start, leaf.size).reshape(leaf.shape)
            start = (start + leaf.size) % period
        leaves.append(jax.device_put(array, place))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
