"""Weights as the native products read them: panels of 64 columns, in their own dtype or quantised to int8."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Num

PANEL_SIZE = 64  # columns of a panel
GATED_RUN = 16  # adjacent columns of the gate; as many columns that the gate is applied to follow them
INT8_HEADER_PAIRS = 2  # pairs of rows whose bytes hold the 64 scales of a panel


def pack(w: Num[Array, "K N"]) -> Num[Array, "N/64 K/2 _ _"]:
    """Returns a weight as `product` reads it, filled up with columns and rows of zeros.

    The pairs of rows of 64 columns lie together: [N/64, K/2, 64, 2] in bfloat16 and int8, [N/64, K/2, 2, 64] in float32.
    """
    num_inputs, num_columns = w.shape
    w = jnp.pad(w, ((0, num_inputs % 2), (0, -num_columns % PANEL_SIZE)))
    w = w.reshape(w.shape[0] // 2, 2, -1, PANEL_SIZE)
    return w.transpose((2, 0, 3, 1) if w.dtype != jnp.float32 else (2, 0, 1, 3))


def pack_gated(w: Float[Array, "K 2 F"]) -> Float[Array, "2F/16 K/2 _ _"]:
    """Returns `pack` of a gate (w[:, 0]) and of the columns that it is applied to (w[:, 1]), 16 columns of each in turns."""
    return pack(_interleaved(w))


def quantize(w: Float[Array, "K N"]) -> tuple[Int8[Array, "K N"], Float32[Array, " N"]]:
    """Returns integers from -127 to 127 and a scale per column: integer * scale is the weight to within half a scale.

    The largest weight of a column is 127 scales, and columns of zeros have the scale 0. A column with a weight that is not
    finite has the scale NaN, so that every product with it is NaN.
    """
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=0)
    scale = jnp.where(jnp.isfinite(largest), largest / 127, jnp.nan)
    whole = jnp.where(scale[None] > 0, jnp.round(w / scale[None]), 0)
    return jnp.clip(whole, -127, 127).astype(jnp.int8), scale


def pack_int8(w: Float[Array, "K N"]) -> Int8[Array, "N/64 2+K/2 64 2"]:
    """Returns `pack` of a quantised weight. The bytes of a panel's 64 scales come first and take the room of two row pairs."""
    integers, scale = quantize(w)
    panels = pack(integers)
    scale = jnp.pad(scale, (0, panels.shape[0] * PANEL_SIZE - scale.shape[0]))
    header = lax.bitcast_convert_type(scale, jnp.int8).reshape(-1, INT8_HEADER_PAIRS, PANEL_SIZE, 2)
    return jnp.concatenate([header, panels], axis=1)


def pack_int8_gated(w: Float[Array, "K 2 F"]) -> Int8[Array, "2F/16 2+K/2 64 2"]:
    """Returns `pack_int8` of a gate and of the columns that it is applied to, in the order of `pack_gated`."""
    return pack_int8(_interleaved(w))


def _interleaved(w: Float[Array, "K 2 F"]) -> Float[Array, "K 2F"]:
    w = jnp.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % GATED_RUN)))
    w = w.reshape(w.shape[0], 2, -1, GATED_RUN).transpose(0, 2, 1, 3)
    return w.reshape(w.shape[0], -1)
