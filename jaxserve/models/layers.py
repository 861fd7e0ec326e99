"""The layers that every family is made of, in plain JAX. Activations are float32; weights may be narrower.

A layer does not depend on pages: its caller passes attention as the function `attend`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from jaxserve.models.config import ModelConfig


class Projection(NamedTuple):
    """Queries, keys and values of some tokens as a layer projects them, and what attention has to do to them first.

    Heads are normalised, then rotated. Kernels do both in the pass that reads the heads anyway.
    """

    qkv: Float32[Array, "B K G+2 D"]  # for each kv head its G query heads, its key, its value
    cos: Float32[Array, "B D/2"]  # cosines of each token's rotary angles
    sin: Float32[Array, "B D/2"]
    q_norm: Float[Array, " D"] | None = None  # scale of an RMSNorm of each query head; None: no norm
    k_norm: Float[Array, " D"] | None = None  # scale of an RMSNorm of each key head; None: no norm
    norm_eps: float = 1e-6


class Attend(Protocol):
    """Attention of some tokens to the keys and values of their own sequences, up to and including their own."""

    def __call__(
        self, projection: Projection, kv: Any, *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], Any]:
        """Adds the tokens' own keys and values to `kv`, then attends with queries scaled by 1/sqrt(D).

        Args:
          projection: queries, keys and values of the tokens; query head h reads kv head h // G.
          kv: the object that carries keys and values from call to call (a pair of page arrays, or None).
          layer: index of the layer, for a `kv` that holds all layers.
          window: number of latest positions that a query sees, its own included; None: all.

        Returns:
          The attention output per query head, and `kv` with the keys and values of this call added.
        """
        ...


def matmul(x: Float[Array, "B I"], w: Float[Array, "I O"]) -> Float32[Array, "B O"]:
    """Returns x @ w: the operands in the weight's dtype, the sum in float32. Every product of the model goes through here."""
    return lax.dot_general(
        x.astype(w.dtype), w, (((1,), (0,)), ((), ())), _precision(w), preferred_element_type=jnp.float32
    )


def matmul_transposed(x: Float[Array, "B I"], w: Float[Array, "O I"]) -> Float32[Array, "B O"]:
    """Returns x @ w.T as `matmul` does, for a weight that is stored output first, as embeddings are."""
    return lax.dot_general(
        x.astype(w.dtype), w, (((1,), (1,)), ((), ())), _precision(w), preferred_element_type=jnp.float32
    )


def _precision(w: Float[Array, "..."]) -> lax.Precision | None:
    """Asks for full float32 products: the default on accelerators is a narrower format."""
    return lax.Precision.HIGHEST if w.dtype == jnp.float32 else None


def random_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """Returns a weight drawn from a normal distribution with the standard deviation 0.02."""
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape)).astype(dtype))


def _bias(enabled: bool, shape: tuple[int, ...], dtype: Any) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape, dtype)) if enabled else None


def _add(y: Float32[Array, "B O"], bias: nnx.Param | None) -> Float32[Array, "B O"]:
    return y if bias is None else y + bias[...].astype(jnp.float32).reshape(1, -1)


def rms_norm(x: Float32[Array, "*B dim"], scale: Float[Array, " dim"], eps: float) -> Float32[Array, "*B dim"]:
    """Applies root mean square normalisation (Zhang and Sennrich, 2019) over the last axis, in float32."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + eps) * jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))


class RMSNorm(nnx.Module):
    """`rms_norm` with a scale that is a parameter."""

    def __init__(self, dim: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float32[Array, "*B dim"]) -> Float32[Array, "*B dim"]:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions.

    `qkv` is one fused kernel, its columns grouped by kv head: for each kv head its G query heads, its key, its value.
    This lets `qkv` be sharded over kv heads on its last axis, and `out` on its first.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.num_kv_heads, self.group_size, self.head_dim = config.num_kv_heads, config.group_size, config.head_dim
        width = config.num_kv_heads * (config.group_size + 2) * config.head_dim
        self.qkv = random_kernel(rngs, (config.embed_dim, width), dtype)
        self.qkv_bias = _bias(config.qkv_bias, (width,), dtype)
        self.out = random_kernel(rngs, (config.num_heads * config.head_dim, config.embed_dim), dtype)
        self.out_bias = _bias(config.out_bias, (config.embed_dim,), dtype)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype) if config.qk_norm else None
        self.norm_eps = config.norm_eps

    def __call__(self, x, rotation, kv, attend: Attend, *, layer: int, window: int | None):
        """Returns the attention output of normalised hidden states, and the new `kv`; see `Attend`."""
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
        self.gate_up = random_kernel(rngs, (config.embed_dim, 2, config.ffw_dim), dtype)
        self.gate_up_bias = _bias(config.ffw_bias, (2, config.ffw_dim), dtype)
        self.down = random_kernel(rngs, (config.ffw_dim, config.embed_dim), dtype)
        self.down_bias = _bias(config.ffw_bias, (config.embed_dim,), dtype)
        self.ffw_dim = config.ffw_dim

    def __call__(self, x: Float32[Array, "B E"]) -> Float32[Array, "B E"]:
        """Returns the network's output for normalised hidden states."""
        y = _add(matmul(x, self.gate_up[...].reshape(x.shape[1], -1)), self.gate_up_bias)
        gate, up = y[:, : self.ffw_dim], y[:, self.ffw_dim :]
        return _add(matmul(nnx.silu(gate) * up, self.down[...]), self.down_bias)


class Block(nnx.Module):
    """A pre-norm transformer block: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.ffw_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.ffw = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(self, x, rotation, kv, attend: Attend, *, layer: int, window: int | None):
        """Returns the new hidden states, and the new `kv`; see `Attend`."""
        out, kv = self.attention(self.attention_norm(x), rotation, kv, attend, layer=layer, window=window)
        x = x + out
        return x + self.ffw(self.ffw_norm(x)), kv
