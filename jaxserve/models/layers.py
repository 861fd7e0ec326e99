"""The layers every family is made of. Activations are float32; weights may be narrower.

A layer knows neither pages nor kernels: attention is the `attend` function it is given.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxserve.models.config import ModelConfig
from pallas_kernels.native import ops as native


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


def project(
    x: Float32[Array, "B I"],
    w: Float[Array, "..."],
    *,
    num_columns: int,
    norm: "RMSNorm | None" = None,
    bias: nnx.Param | None = None,
    residual: Float32[Array, "B O"] | None = None,
    gated: bool = False,
    num_rows: Int32[Array, ""] | None = None,
) -> Float32[Array, "B O"]:
    """residual + act(norm(x) @ w + bias): all that happens around a product, so that one kernel can do it.

    Args:
      x: rows.
      w: [I, O]; [I, 2, O] if gated; or what `prepare` made of it, which a native kernel multiplies.
      num_columns: O.
      norm: of x; None: x stays.
      bias: of all columns of w.
      residual: added at last.
      gated: SwiGLU (Shazeer, 2020): silu(first half) * second half.
      num_rows: rows that count, the others may come back undefined; None: all. Only native kernels save work by it.
    """
    if is_prepared(w):
        return native.product(
            x,
            w,
            num_columns=num_columns,
            num_rows=num_rows,
            scale=None if norm is None else norm.scale[...],
            eps=1e-6 if norm is None else norm.eps,
            bias=None if bias is None else bias[...].reshape(-1),
            residual=residual,
            gated=gated,
        )
    y = _add(matmul(x if norm is None else norm(x), w.reshape(x.shape[1], -1)), bias)
    if gated:
        y = nnx.silu(y[:, :num_columns]) * y[:, num_columns:]
    return y if residual is None else residual + y


def is_prepared(w: Float[Array, "..."]) -> bool:
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

    def __call__(
        self, x, norm: RMSNorm, rotation, kv, attend: Attend, *, layer: int, window: int | None, num_rows=None
    ):
        """x plus what attention makes of norm(x)."""
        width = self.num_kv_heads * (self.group_size + 2) * self.head_dim
        y = project(x, self.qkv[...], num_columns=width, norm=norm, bias=self.qkv_bias, num_rows=num_rows)
        projection = Projection(
            y.reshape(x.shape[0], self.num_kv_heads, self.group_size + 2, self.head_dim),
            *rotation,
            q_norm=None if self.q_norm is None else self.q_norm.scale[...],
            k_norm=None if self.k_norm is None else self.k_norm.scale[...],
            norm_eps=self.norm_eps,
        )
        out, kv = attend(projection, kv, layer=layer, window=window)
        out = out.reshape(x.shape[0], -1)
        options: dict[str, Any] = {"bias": self.out_bias, "residual": x, "num_rows": num_rows}
        return project(out, self.out[...], num_columns=x.shape[1], **options), kv


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up fused into one kernel [E, 2, F]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.gate_up = _kernel(rngs, (config.embed_dim, 2, config.ffw_dim), dtype)
        self.gate_up_bias = _bias(config.ffw_bias, (2, config.ffw_dim), dtype)
        self.down = _kernel(rngs, (config.ffw_dim, config.embed_dim), dtype)
        self.down_bias = _bias(config.ffw_bias, (config.embed_dim,), dtype)
        self.ffw_dim = config.ffw_dim

    def __call__(self, x: Float32[Array, "B E"], norm: RMSNorm, *, num_rows=None) -> Float32[Array, "B E"]:
        """x plus what the network makes of norm(x)."""
        options: dict[str, Any] = {"bias": self.gate_up_bias, "gated": True, "num_rows": num_rows}
        y = project(x, self.gate_up[...], num_columns=self.ffw_dim, norm=norm, **options)
        options = {"bias": self.down_bias, "residual": x, "num_rows": num_rows}
        return project(y, self.down[...], num_columns=x.shape[1], **options)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.ffw_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.ffw = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(self, x, rotation, kv, attend: Attend, *, layer: int, window: int | None, num_rows=None):
        options: dict[str, Any] = {"layer": layer, "window": window, "num_rows": num_rows}
        x, kv = self.attention(x, self.attention_norm, rotation, kv, attend, **options)
        return self.ffw(x, self.ffw_norm, num_rows=num_rows), kv
