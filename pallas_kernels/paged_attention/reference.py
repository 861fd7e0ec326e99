"""Attention over pages in plain jax.numpy: the specification, and the fallback where no kernel runs.

Blocks of keys start at absolute multiples of a fixed number of positions and are folded into a running softmax (Milakov and
Gimelshein, 2018; Dao et al., 2022). A block that a batch row does not reach changes none of its bits: the maximum stays, the
correction is exp(0) = 1, and the added terms are 0. So the result of a batch row depends neither on the others nor on how its
prompt was cut into chunks, while the work follows the longest batch row present.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.pages import PagedKV, as_float

_EXACT = lax.Precision.HIGHEST  # no rounding of float32 operands on accelerators
_BLOCK_POSITIONS = 64  # fastest of 16..256 on CPU


def paged_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
) -> Float32[Array, "B H D"]:
    """Computes softmax attention (PagedAttention, Kwon et al., 2023) of each batch row to positions 0..position of its slot.

    Every batch row reads the pages of its slot separately, also when rows of one prompt are adjacent. That is simple, and slow
    for long prompts.

    Args:
      q: queries, already scaled; head h reads kv head h // (H // K).
      kv: keys and values. No position that a batch row sees may lie in a page of id "none".
      slot: slot of each batch row; S: no slot, and then the result is 0.
      position: position of each batch row.
      window: how many of the latest positions a batch row sees, its own included; None: all.
      softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None: they stay as they are.
      sinks: for each head a score that takes part in the softmax and has no value (GPT-OSS); None: no sinks.

    Returns:
      The attention output, accumulated in float32. Numbers at positions that a batch row does not see never reach it, not even
      NaN.
    """
    num_rows, num_heads, head_dim = q.shape
    num_slots, pages_per_slot = kv.page_ids.shape
    num_pages, num_kv_heads, page_size, _ = kv.k.shape
    pages_per_block = max(_BLOCK_POSITIONS // page_size, 1)
    q = q.astype(jnp.float32).reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if kv.k_scale is not None:
        q = q * kv.k_scale[None, :, None, None]
    position = jnp.where(slot < num_slots, position, -1)
    oldest = jnp.zeros_like(position) if window is None else jnp.maximum(position - (window - 1), 0)

    padding = -pages_per_slot % pages_per_block
    page_ids = jnp.pad(kv.page_ids, ((0, 0), (0, padding)), constant_values=num_pages)
    page_ids = page_ids.at[slot].get(mode="fill", fill_value=num_pages)

    def fold(carry):
        block, largest, total, out = carry
        pages = lax.dynamic_slice_in_dim(page_ids, block * pages_per_block, pages_per_block, axis=1)
        key_positions = (block * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)) * page_size
        key_positions = key_positions[None, :, None] + jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
        visible = (key_positions <= position[:, None, None]) & (key_positions >= oldest[:, None, None])
        k = as_float(kv.k.at[pages].get(mode="clip"))
        v = jnp.where(visible[:, :, None, :, None], as_float(kv.v.at[pages].get(mode="clip")), 0)
        scores = jnp.einsum("bkgd,bpktd->bkgpt", q, k, precision=_EXACT)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=(3, 4)))
        base = jnp.where(new_largest == -jnp.inf, 0, new_largest)
        weights = jnp.exp(scores - base[..., None, None])
        correction = jnp.exp(largest - base)
        total = total * correction + jnp.sum(weights, axis=(3, 4))
        out = out * correction[..., None] + jnp.einsum("bkgpt,bpktd->bkgd", weights, v, precision=_EXACT)
        return block + 1, new_largest, total, out

    positions_per_block = pages_per_block * page_size
    first = jnp.min(jnp.where(position >= 0, oldest, jnp.iinfo(jnp.int32).max))
    num_blocks = lax.div(jnp.max(position), jnp.int32(positions_per_block)) + 1
    num_blocks = jnp.where(jnp.max(position) >= 0, num_blocks, 0)
    zeros = jnp.zeros(q.shape[:3], jnp.float32)
    carry = (lax.div(first, jnp.int32(positions_per_block)), zeros - jnp.inf, zeros, jnp.zeros(q.shape, jnp.float32))
    _, largest, total, out = lax.while_loop(lambda carry: carry[0] < num_blocks, fold, carry)
    if sinks is not None:
        out, total = _with_sinks(out, largest, total, sinks.reshape(1, num_kv_heads, -1))
    if kv.v_scale is not None:
        out = out * kv.v_scale[None, :, None, None]
    out = jnp.where(total[..., None] == 0, 0, out / total[..., None])
    return out.reshape(num_rows, num_heads, head_dim)


def _with_sinks(
    out: Float32[Array, "B K G D"],
    largest: Float32[Array, "B K G"],
    total: Float32[Array, "B K G"],
    sinks: Float32[Array, "1 K G"],
) -> tuple[Float32[Array, "B K G D"], Float32[Array, "B K G"]]:
    new_largest = jnp.maximum(largest, sinks)
    base = jnp.where(new_largest == -jnp.inf, 0, new_largest)
    correction = jnp.exp(largest - base)
    return out * correction[..., None], total * correction + jnp.exp(sinks - base)
