"""Parameters as the kernels of a backend read them: a relayout, made once and not per step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import is_prepared
from jaxserve.models.params import abstract_params, leaves_with_paths
from pallas_kernels.native import ops as native


def prepare(params: nnx.State, model: ModelConfig, backend: str) -> nnx.State:
    """The same parameters, for `backend`: packed for "native", else as they are. Prepared ones stay as they are.

    Pure and jittable. The functional API takes parameters either way and prepares them itself, outside of its loops; whoever
    calls `step` in a loop of their own prepares them before it. float16 weights are not packed: plain JAX multiplies them.

    Args:
      params: `nnx.split(Transformer(model))[1]`, or what this function returned.
      model: of the parameters.
      backend: as in `EngineConfig.attention_backend`, not None.
    """
    return _prepare(params, model, backend, lambda relayout, leaf: _jitted(relayout)(leaf))


def prepare_and_free(params: nnx.State, model: ModelConfig, backend: str) -> nnx.State:
    """`prepare` that deletes each array as soon as it is packed: at most one of them is there twice."""

    def replace(relayout: Callable[[Array], Array], leaf: Array) -> Array:
        new = jax.block_until_ready(_jitted(relayout)(leaf))
        leaf.delete()
        return new

    return _prepare(params, model, backend, replace)


def unprepared(params: nnx.State, model: ModelConfig) -> nnx.State:
    """Shapes and dtypes of the parameters before they were prepared, if they were."""
    if any(is_prepared(leaf) for leaf in jax.tree.leaves(params)):
        return abstract_params(model, jax.tree.leaves(params["embedding"])[0].dtype)
    return jax.eval_shape(lambda: params)


def _prepare(
    params: nnx.State,
    model: ModelConfig,
    backend: str,
    replace: Callable[[Callable[[Array], Array], Array], Array],
) -> nnx.State:
    if backend != "native":
        return params
    leaves = []
    for path, leaf in leaves_with_paths(params):
        relayout = _relayout(str(path[-1]), leaf, tied=model.tied_embeddings)
        leaves.append(leaf if relayout is None else replace(relayout, leaf))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


_jitted = functools.cache(jax.jit)


def _relayout(name: str, leaf: Array, *, tied: bool) -> Callable[[Array], Array] | None:
    """What is to be done to an array; None: nothing."""
    if leaf.dtype not in (jnp.float32, jnp.bfloat16) or is_prepared(leaf):
        return None
    if name in ("qkv", "out", "down"):
        return native.pack
    if name == "gate_up":
        return native.pack_gated
    if name == "lm_head" or (name == "embedding" and tied):
        return _pack_transposed
    if name == "embedding" or leaf.dtype == jnp.float32:
        return None
    return _to_float32  # scales and biases


def _pack_transposed(w: Array) -> Array:
    return native.pack(w.T)


def _to_float32(x: Array) -> Array:
    return x.astype(jnp.float32)
