"""Norm, rotary embedding and the write to pages in plain jax.numpy: the specification, and the fallback without a kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.pages import PagedKV, as_stored


def rotary_write(
    qkv: Float32[Array, "B K G+2 D"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Float32[Array, "B H D"], Shaped[Array, "N K T D"], Shaped[Array, "N K T D"]]:
    """Returns queries ready for attention, and the pages with the keys and values of all batch rows in them.

    Args:
      qkv: the fused projection, grouped by kv head: for each its G query heads, its key and its value.
      cos, sin: cosines and sines of the rotary angles of each batch row, times the scaling that some kinds of rotary embedding
        have.
      kv: the pages to write to. A number is stored as number / scale.
      slot: slot of each batch row; S: no slot, so that the batch row writes nothing.
      position: position of each batch row. No two batch rows with a slot may have the same slot and position.
      q_norm, k_norm: scale of an RMSNorm per head before the rotation (Qwen3); None: no norm.
      norm_eps: number that the RMSNorm adds to the mean square.

    Returns:
      The queries, rotated and scaled by 1/sqrt(D), and the pages of keys and of values.
    """
    q, k, v = rotated_heads(qkv, cos, sin, q_norm, k_norm, norm_eps)
    page, offset = kv.page_of(slot, position), lax.rem(position, jnp.int32(kv.page_size))
    return q, write_rows(kv.k, k, kv.k_scale, page, offset), write_rows(kv.v, v, kv.v_scale, page, offset)


def rotated_heads(
    qkv: Float32[Array, "B K G+2 D"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Float32[Array, "B H D"], Float32[Array, "B K D"], Float32[Array, "B K D"]]:
    """Returns queries (after norm and rotation, scaled by 1/sqrt(D)), keys (after norm and rotation) and values.

    The arguments are those of `rotary_write`.
    """
    num_rows, _, _, head_dim = qkv.shape
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    q, k = _normalised(q, q_norm, norm_eps), _normalised(k, k_norm, norm_eps)
    q = _rotated(q, cos[:, None, None], sin[:, None, None]) * head_dim**-0.5
    return q.reshape(num_rows, -1, head_dim), _rotated(k, cos[:, None], sin[:, None]), v


def write_rows(
    pages: Shaped[Array, "N K T D"],
    rows: Float32[Array, "B K D"],
    scale: Float32[Array, " K"] | None,
    page_id: Int32[Array, " B"],
    offset: Int32[Array, " B"],
) -> Shaped[Array, "N K T D"]:
    """Stores the heads of each batch row at `offset` of page `page_id`. A batch row whose page is "none" (N) is dropped."""
    if scale is not None:
        rows = rows / scale[None, :, None]
    # The index names the head too: for whole columns of heads, XLA:TPU converts the pool to another layout and back in loops.
    head = jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :]
    return pages.at[page_id[:, None], head, offset[:, None]].set(as_stored(rows, pages.dtype), mode="drop")


def _normalised(x: Float32[Array, "*B D"], scale: Float[Array, " D"] | None, eps: float) -> Float32[Array, "*B D"]:
    if scale is None:
        return x
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + eps) * jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))


def _rotated(x: Float32[Array, "*B D"], cos: Float32[Array, "*B D/2"], sin: Float32[Array, "*B D/2"]):
    """Rotates the pairs (x[i], x[i + D/2]), which is the pairing of Hugging Face checkpoints."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
