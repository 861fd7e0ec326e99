"""The layers every family is made of. Activations are float32; weights may be narrower.

A layer computes with plain JAX, and knows no pages: attention is the `attend` function it is given. What native kernels need
of a block they get from `Block.weights`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Num

from jaxserve.models.config import ModelConfig
from pallas_kernels import native


class Projection(NamedTuple):
    """Queries, keys and values of some rows as a layer projects them, and what is to be done to them before attention.

    Heads are first normalised, then rotated; a kernel does both while it has them at hand.
    """

    qkv: Float32[Array, "B K G+2 D"]  # for each kv head its G query heads, its key, its value
    cos: Float32[Array, "B D/2"]  # of each row's rotary angles
    sin: Float32[Array, "B D/2"]
    q_norm: Float[Array, " D"] | None = None  # scale of an RMSNorm per query head; None: there is none
    k_norm: Float[Array, " D"] | None = None  # of keys
    norm_eps: float = 1e-6


class Attend(Protocol):
    """Attention of some rows to the keys and values of their own sequences up to and including themselves."""

    def __call__(
        self, projection: Projection, kv: Any, *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], Any]:
        """Adds the rows' own keys and values to `kv`, then attends with queries scaled by 1/sqrt(D).

        Args:
          projection: of the rows; query head h reads kv head h // G.
          kv: whatever carries keys and values from call to call (a pair of page arrays, or None).
          layer: index of the layer, for a `kv` that holds all layers.
          window: number of latest positions a query sees, its own included; None: all.

        Returns:
          The attention output per query head, and `kv` with this call's rows added.
        """
        ...


def matmul(x: Float[Array, "B I"], w: Float[Array, "I O"]) -> Float32[Array, "B O"]:
    """The one product of the model: operands in the weight's dtype, accumulated in float32."""
    return lax.dot_general(
        x.astype(w.dtype), w, (((1,), (0,)), ((), ())), _precision(w), preferred_element_type=jnp.float32
    )


def matmul_transposed(x: Float[Array, "B I"], w: Float[Array, "O I"]) -> Float32[Array, "B O"]:
    """`matmul` with a weight stored output-first, as embeddings are."""
    return lax.dot_general(
        x.astype(w.dtype), w, (((1,), (1,)), ((), ())), _precision(w), preferred_element_type=jnp.float32
    )


def _precision(w: Float[Array, "..."]) -> lax.Precision | None:
    """float32 means float32: the default is a narrower format on accelerators."""
    return lax.Precision.HIGHEST if w.dtype == jnp.float32 else None


def is_prepared(w: Num[Array, "..."]) -> bool:
    """Whether a weight is packed for native kernels; no other has four axes."""
    return w.ndim == 4


def _kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape)).astype(dtype))


def _bias(enabled: bool, shape: tuple[int, ...], dtype: Any) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape, dtype)) if enabled else None


def _add(y: Float32[Array, "B O"], bias: nnx.Param | None) -> Float32[Array, "B O"]:
    return y if bias is None else y + bias[...].astype(jnp.float32).reshape(1, -1)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019) over the last axis."""

    def __init__(self, dim: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float32[Array, "*B dim"]) -> Float32[Array, "*B dim"]:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
        return x * lax.rsqrt(mean_square + self.eps) * scale


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions.

    `qkv` is one fused kernel, its columns grouped by kv head: for each kv head its G query heads, its key, its value.
    So it can be sharded over kv heads on its last axis, as `out` can on its first.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.num_kv_heads, self.group_size, self.head_dim = config.num_kv_heads, config.group_size, config.head_dim
        width = config.num_kv_heads * (config.group_size + 2) * config.head_dim
        self.qkv = _kernel(rngs, (config.embed_dim, width), dtype)
        self.qkv_bias = _bias(config.qkv_bias, (width,), dtype)
        self.out = _kernel(rngs, (config.num_heads * config.head_dim, config.embed_dim), dtype)
        self.out_bias = _bias(config.out_bias, (config.embed_dim,), dtype)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.norm_eps = config.norm_eps

    def __call__(self, x, rotation, kv, attend: Attend, *, layer: int, window: int | None):
        """Attention of normalised rows."""
        qkv = _add(matmul(x, self.qkv[...]), self.qkv_bias)
        projection = Projection(
            qkv.reshape(x.shape[0], self.num_kv_heads, self.group_size + 2, self.head_dim),
            *rotation,
            q_norm=None if self.q_norm is None else self.q_norm.scale[...],
            k_norm=None if self.k_norm is None else self.k_norm.scale[...],
            norm_eps=self.norm_eps,
        )
        out, kv = attend(projection, kv, layer=layer, window=window)
        return _add(matmul(out.reshape(x.shape[0], -1), self.out[...]), self.out_bias), kv


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up fused into one kernel [E, 2, F]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.gate_up = _kernel(rngs, (config.embed_dim, 2, config.ffw_dim), dtype)
        self.gate_up_bias = _bias(config.ffw_bias, (2, config.ffw_dim), dtype)
        self.down = _kernel(rngs, (config.ffw_dim, config.embed_dim), dtype)
        self.down_bias = _bias(config.ffw_bias, (config.embed_dim,), dtype)
        self.ffw_dim = config.ffw_dim

    def __call__(self, x: Float32[Array, "B E"]) -> Float32[Array, "B E"]:
        """The network on normalised rows."""
        y = _add(matmul(x, self.gate_up[...].reshape(x.shape[1], -1)), self.gate_up_bias)
        gate, up = y[:, : self.ffw_dim], y[:, self.ffw_dim :]
        return _add(matmul(nnx.silu(gate) * up, self.down[...]), self.down_bias)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.ffw_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.ffw = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(self, x, rotation, kv, attend: Attend, *, layer: int, window: int | None):
        out, kv = self.attention(self.attention_norm(x), rotation, kv, attend, layer=layer, window=window)
        x = x + out
        return x + self.ffw(self.ffw_norm(x)), kv

    def weights(self) -> native.BlockWeights:
        """Of a block that `prepare` packed, as native kernels take them."""

        def value(param: nnx.Param | None) -> Array | None:
            return None if param is None else param[...]

        def scale(norm: RMSNorm | None) -> Array | None:
            return None if norm is None else norm.scale[...]

        attention, ffw = self.attention, self.ffw
        return native.BlockWeights(
            qkv=attention.qkv[...],
            qkv_bias=value(attention.qkv_bias),
            out=attention.out[...],
            out_bias=value(attention.out_bias),
            gate_up=ffw.gate_up[...],
            gate_up_bias=value(ffw.gate_up_bias),
            down=ffw.down[...],
            down_bias=value(ffw.down_bias),
            attention_norm=self.attention_norm.scale[...],
            ffw_norm=self.ffw_norm.scale[...],
            q_norm=scale(attention.q_norm),
            k_norm=scale(attention.k_norm),
        )
