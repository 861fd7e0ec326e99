"""Parameters in the layout that a backend's kernels read. The relayout is made once, and not in every step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.models.config import ModelConfig
from jaxserve.models.native import PackedParams
from jaxserve.models.params import Path, abstract_params, check_params, leaves_with_paths
from pallas_kernels import native

Params = nnx.State | PackedParams
"""Parameters of a model, unprepared or packed."""

_Relayout = Callable[[Array], Array]

# The path within a block of `Transformer` to the weight for each field of `BlockWeights`.
PLACES: dict[str, Path] = {
    "qkv": ("attention", "qkv"),
    "qkv_bias": ("attention", "qkv_bias"),
    "out": ("attention", "out"),
    "out_bias": ("attention", "out_bias"),
    "gate_up": ("ffw", "gate_up"),
    "gate_up_bias": ("ffw", "gate_up_bias"),
    "down": ("ffw", "down"),
    "down_bias": ("ffw", "down_bias"),
    "attention_norm": ("attention_norm", "scale"),
    "ffw_norm": ("ffw_norm", "scale"),
    "q_norm": ("attention", "q_norm", "scale"),
    "k_norm": ("attention", "k_norm", "scale"),
}


def prepare(params: Params, model: ModelConfig, backend: str, weight_dtype: str | None = None) -> Params:
    """Returns the parameters as `backend` reads them: a `PackedParams` for "native", else `params` itself.

    Pure and jittable. The functional API takes parameters either way and prepares them itself, outside of its loops; call
    this before a loop of your own around `step`. Packed parameters come back unchanged, and so do float16 ones, which plain
    JAX multiplies.

    Args:
      params: `nnx.split(Transformer(model))[1]`, or what this function returned.
      model: the model of the parameters.
      backend: as in `EngineConfig.attention_backend`, not None.
      weight_dtype: as in `EngineConfig`. An embedding that is not tied to the output is only looked up, and keeps its dtype.

    Raises:
      ValueError: if the parameters were packed for another backend or with another `weight_dtype`, if they cannot have this
        one (they must all be bfloat16, or all float32), or if they are not those of the model.
    """
    return _prepare(params, model, backend, weight_dtype, lambda relayout, leaf: _jitted(relayout)(leaf))


def prepare_and_free(params: Params, model: ModelConfig, backend: str, weight_dtype: str | None = None) -> Params:
    """Does what `prepare` does, and deletes each array as soon as it is packed: at most one array is in memory twice."""

    def replace(relayout: _Relayout, leaf: Array) -> Array:
        new = jax.block_until_ready(_jitted(relayout)(leaf))
        leaf.delete()
        return new

    return _prepare(params, model, backend, weight_dtype, replace)


def unprepared(params: Params, model: ModelConfig) -> nnx.State:
    """Returns shapes and dtypes of the parameters as they were before `prepare`."""
    if isinstance(params, PackedParams):
        return abstract_params(model, params.loaded_dtype)
    return jax.eval_shape(lambda: params)


def loaded_dtype(params: Params) -> np.dtype:
    """Returns the dtype that the weights had before `prepare`."""
    return params.loaded_dtype if isinstance(params, PackedParams) else embedding_of(params).dtype


def embedding_of(params: Params) -> Array:
    """Returns the array that holds the embedding, of either kind of parameters; its device is that of the weights."""
    if isinstance(params, PackedParams):
        return params.embedding
    (leaf,) = jax.tree.leaves(params["embedding"])
    return leaf


def _prepare(
    params: Params,
    model: ModelConfig,
    backend: str,
    weight_dtype: str | None,
    replace: Callable[[_Relayout, Array], Array],
) -> Params:
    if backend != "native" and weight_dtype is not None:
        raise ValueError(f"weight_dtype={weight_dtype!r} needs the backend 'native', not {backend!r}: leave it out")
    if isinstance(params, PackedParams):
        _check_packed(params, backend, weight_dtype)
        return params
    if backend != "native":
        return params
    leaves = leaves_with_paths(params)
    _check_dtypes(leaves, loaded_dtype(params), weight_dtype)
    if any(leaf.dtype == jnp.float16 for _, leaf in leaves):
        return params
    check_params(params, model)
    return _pack(leaves, model, loaded_dtype(params), weight_dtype, replace)


def _pack(
    leaves: list[tuple[Path, Any]],
    model: ModelConfig,
    dtype: np.dtype,
    weight_dtype: str | None,
    replace: Callable[[_Relayout, Array], Array],
) -> PackedParams:
    packed: dict[Path, Array] = {}
    for path, leaf in leaves:
        relayout = _relayout(path, leaf, tied=model.tied_embeddings, int8=weight_dtype == "int8")
        packed[path] = leaf if relayout is None else replace(relayout, leaf)

    def block(layer: int) -> native.BlockWeights:
        weights: dict[str, Any] = {name: packed.get(("blocks", layer, *place)) for name, place in PLACES.items()}
        return native.BlockWeights(**weights)

    return PackedParams(
        embedding=packed["embedding",],
        blocks=tuple(block(layer) for layer in range(model.num_layers)),
        final_norm=packed["final_norm", "scale"],
        lm_head=packed.get(("lm_head",)),
        loaded_dtype=dtype,
        weight_dtype=weight_dtype,
    )


_jitted = functools.cache(jax.jit)


def _check_packed(params: PackedParams, backend: str, weight_dtype: str | None) -> None:
    if backend != "native":
        raise ValueError(
            f"these parameters are prepared for native kernels, not for the backend {backend!r}: give the parameters that "
            "were loaded"
        )
    if params.weight_dtype != weight_dtype:
        raise ValueError(
            f"these parameters were prepared with weight_dtype={params.weight_dtype!r}, not with weight_dtype="
            f"{weight_dtype!r}: prepare the parameters that were loaded with the weight_dtype of the configuration"
        )


def _check_dtypes(leaves: list[tuple[Path, Any]], dtype: np.dtype, weight_dtype: str | None) -> None:
    """Raises ValueError where `weight_dtype` is given and the leaves cannot have it."""
    if weight_dtype is None:
        return
    for path, leaf in leaves:
        if leaf.dtype != dtype:
            raise ValueError(
                f"weight_dtype={weight_dtype!r} is for parameters of one dtype, but {path[-1]} is {leaf.dtype} beside "
                f"{dtype}: convert them first"
            )
        if leaf.dtype == jnp.float16:
            raise ValueError(f"float16 weights have no weight_dtype={weight_dtype!r}: load them in bfloat16 or float32")


def _relayout(path: Path, leaf: Any, *, tied: bool, int8: bool) -> _Relayout | None:
    """Returns the function that turns an array of `Transformer` into one of `PackedParams`; None: it stays as it is."""
    name = path[-1]
    if name in ("qkv", "out", "down"):
        return native.pack_int8 if int8 else native.pack
    if name == "gate_up":
        return native.pack_int8_gated if int8 else native.pack_gated
    if name == "lm_head" or (name == "embedding" and tied):
        return _pack_int8_transposed if int8 else _pack_transposed
    if name == "embedding" or leaf.dtype == jnp.float32:
        return None
    return _to_float32  # scales and biases


def _pack_transposed(w: Array) -> Array:
    return native.pack(w.T)


def _pack_int8_transposed(w: Array) -> Array:
    return native.pack_int8(w.T)


def _to_float32(x: Array) -> Array:
    return x.astype(jnp.float32)
