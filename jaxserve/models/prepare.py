"""Parameters as the kernels of a backend read them: a relayout, made once and not per step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import is_prepared
from jaxserve.models.params import Path, abstract_params, leaves_with_paths
from pallas_kernels import native


def prepare(params: nnx.State, model: ModelConfig, backend: str, weight_dtype: str | None = None) -> nnx.State:
    """The same parameters, for `backend`: packed for "native", else as they are. Prepared ones stay as they are.

    Pure and jittable. The functional API takes parameters either way and prepares them itself, outside of its loops; whoever
    calls `step` in a loop of their own prepares them before it. float16 weights are not packed: plain JAX multiplies them.

    Args:
      params: `nnx.split(Transformer(model))[1]`, or what this function returned.
      model: of the parameters.
      backend: as in `EngineConfig.attention_backend`, not None.
      weight_dtype: as in `EngineConfig`. An embedding that is not tied to the output is looked up only, and keeps its dtype.

    Raises:
      ValueError: if the parameters were prepared with another `weight_dtype`, or cannot have this one: they must be bfloat16 or
        float32, all of them.
    """
    return _prepare(params, model, backend, weight_dtype, lambda relayout, leaf: _jitted(relayout)(leaf))


def prepare_and_free(params: nnx.State, model: ModelConfig, backend: str, weight_dtype: str | None = None) -> nnx.State:
    """`prepare` that deletes each array as soon as it is packed: at most one of them is there twice."""

    def replace(relayout: Callable[[Array], Array], leaf: Array) -> Array:
        new = jax.block_until_ready(_jitted(relayout)(leaf))
        leaf.delete()
        return new

    return _prepare(params, model, backend, weight_dtype, replace)


def unprepared(params: nnx.State, model: ModelConfig) -> nnx.State:
    """Shapes and dtypes of the parameters before they were prepared, if they were."""
    if any(is_prepared(leaf) for leaf in jax.tree.leaves(params)):
        return abstract_params(model, loaded_dtype(params))
    return jax.eval_shape(lambda: params)


def loaded_dtype(params: nnx.State) -> np.dtype:
    """Dtype of the weights before they were prepared, if they were."""
    (embedding,), (scale,) = (jax.tree.leaves(params[name]) for name in ("embedding", "final_norm"))
    return scale.dtype if embedding.dtype == jnp.int8 else embedding.dtype


def _prepare(
    params: nnx.State,
    model: ModelConfig,
    backend: str,
    weight_dtype: str | None,
    replace: Callable[[Callable[[Array], Array], Array], Array],
) -> nnx.State:
    if backend != "native":
        if weight_dtype is not None:
            raise ValueError(f"weight_dtype={weight_dtype!r} needs the backend 'native', not {backend!r}: leave it out")
        return params
    _check_dtypes(params, weight_dtype)
    leaves = []
    for path, leaf in leaves_with_paths(params):
        relayout = _relayout(path, leaf, tied=model.tied_embeddings, int8=weight_dtype == "int8")
        leaves.append(leaf if relayout is None else replace(relayout, leaf))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


_jitted = functools.cache(jax.jit)


def _check_dtypes(params: nnx.State, weight_dtype: str | None) -> None:
    raw = not any(is_prepared(leaf) for leaf in jax.tree.leaves(params))
    for path, leaf in leaves_with_paths(params):
        if is_prepared(leaf) and (leaf.dtype == jnp.int8) != (weight_dtype == "int8"):
            raise ValueError(
                f"{path[-1]} was prepared as {leaf.dtype}, which is not weight_dtype={weight_dtype!r}: prepare the parameters "
                "that were loaded with the weight_dtype of the configuration"
            )
        if weight_dtype is not None and raw and leaf.dtype != loaded_dtype(params):
            raise ValueError(
                f"weight_dtype={weight_dtype!r} is for parameters of one dtype, but {path[-1]} is {leaf.dtype} beside "
                f"{loaded_dtype(params)}: convert them first"
            )
        if leaf.dtype == jnp.float16 and weight_dtype is not None:
            raise ValueError(f"float16 weights have no weight_dtype={weight_dtype!r}: load them in bfloat16 or float32")


def _relayout(path: Path, leaf: Array, *, tied: bool, int8: bool) -> Callable[[Array], Array] | None:
    """What is to be done to an array; None: nothing."""
    name = path[-1]
    if leaf.dtype not in (jnp.float32, jnp.bfloat16) or is_prepared(leaf):
        return None
    if name in ("qkv", "out", "down"):
        return native.pack_int8 if int8 else native.pack
    if name == "gate_up":
        return native.pack_int8_gated if int8 else native.pack_gated
    if name == "lm_head" or (name == "embedding" and tied):
        return _pack_int8_transposed if int8 else _pack_transposed
    if name == "embedding" or leaf.dtype == jnp.float32:
        return None
    if path[0] == "final_norm" and int8:
        return None  # it tells `loaded_dtype`
    return _to_float32  # scales and biases


def _pack_transposed(w: Array) -> Array:
    return native.pack(w.T)


def _pack_int8_transposed(w: Array) -> Array:
    return native.pack_int8(w.T)


def _to_float32(x: Array) -> Array:
    return x.astype(jnp.float32)
