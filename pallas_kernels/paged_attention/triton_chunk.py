"""Attention of chunks over pages on NVIDIA GPUs: FlashAttention-2 (Dao, 2023) of ragged rows in Pallas, lowered to Triton.

One program works on one kv head of one query block. Each batch row gives one query per head of the group, and these queries are
the rows of the matrix products. A tile that all batch rows see as a whole needs no mask; a tile that some see in part does:

    rows at positions 300..331, window 150:     tile    2 masked | 3 whole  | 4 masked, 5 masked
    the first sees 151..300, the last 182..331          128..191 | 192..255 | 256..319, 320..383

The bits of a batch row do not depend on the loop that takes a tile: a mask that is True everywhere changes nothing, the sums
run in the same order, and no multiplication meets an addition that only one of the loops could fuse it with. Tiles start at
absolute multiples of their size, and a tile that a batch row does not see changes none of its bits. So the other batch rows
of its block do not change them either.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.paged_attention import triton_tiles as tiles
from pallas_kernels.paged_attention.query_blocks import QueryBlocks
from pallas_kernels.pages import PagedKV

_BLOCK_QUERIES = 128


def block_rows(group_size: int) -> int:
    """Returns the batch rows per query block that `chunk_attention` works on.

    Args:
      group_size: query heads per kv head.
    """
    return max(_BLOCK_QUERIES // tiles.padded(group_size, 1), 1)


def chunk_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    blocks: QueryBlocks,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    interpret: bool = False,
) -> Float32[Array, "B H D"]:
    """Computes `reference.paged_attention`. Operands of products are rounded to `triton_tiles.compute_dtype`.

    Numbers that are not finite reach only the batch rows that see them. The result of such a row is not finite in some or in
    all dimensions of the head, depending on its place in its block.

    Args:
      q, kv, window, softcap, sinks: as in the reference.
      blocks: blocks of at most `block_rows` batch rows each, which together hold every batch row once.
      interpret: whether to run in Pallas' interpreter.

    Raises:
      ValueError: if the shapes or the dtype of the pages are not supported.
    """
    tiles.check_supported(q, kv)
    _, num_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[1]
    group_size = num_heads // num_kv_heads
    kv = kv._replace(k=tiles.kernel_pages(kv.k), v=tiles.kernel_pages(kv.v))
    sizes = _sizes(head_dim, kv.k.dtype)
    block_queries = block_rows(group_size) * tiles.padded(group_size, 1)
    attend = tiles.triton_call(
        functools.partial(_kernel, group_size=group_size, sizes=sizes, window=window, softcap=softcap),
        grid=(num_kv_heads, blocks.slot.shape[0], block_queries // sizes.queries),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        num_warps=8,
        num_stages=sizes.num_stages,
        name="paged_chunk",
        interpret=interpret,
    )
    return attend(q, kv, blocks, sinks)


class _Sizes(NamedTuple):
    queries: int  # per program; a block with more takes several programs
    tile: int  # positions
    num_stages: int


def _sizes(head_dim: int, dtype: jnp.dtype) -> _Sizes:
    """Returns the sizes with which, and with 8 warps, no named shape spills registers on sm_90a."""
    if dtype == jnp.float32:  # float32 uses no tensor cores and spills sooner
        return _Sizes(queries=32, tile=16, num_stages=3)
    if head_dim > 128:
        return _Sizes(queries=128, tile=32 if dtype.itemsize > 1 else 16, num_stages=2)
    return _Sizes(queries=128, tile=64, num_stages=3)


class _Span(NamedTuple):
    """The positions from `oldest` to `last`, which the queries of a program see together."""

    oldest: Int32[Array, ""]
    last: Int32[Array, ""]  # -1: the queries see nothing
    newest_of: Int32[Array, " queries"]
    window: int | None

    def tile_bounds(self, first: Int32[Array, ""], tile_size: int) -> tuple[Int32[Array, ""], ...]:
        """Returns four bounds of three ranges of tiles: masked at the lower edge, whole, masked at the upper edge."""
        size = np.int32(tile_size)
        begin, end = lax.div(self.oldest, size), lax.div(self.last + size, size)
        whole_begin = begin
        if self.window is not None:
            oldest_of_last = jnp.maximum(self.last - (self.window - 1), 0)
            whole_begin = jnp.minimum(lax.div(oldest_of_last + (size - 1), size), end)
        return begin, whole_begin, jnp.maximum(lax.div(first + 1, size), whole_begin), end

    def holds(self, positions: Int32[Array, " tile"]) -> Bool[Array, " tile"]:
        """Returns whether each position lies in the span."""
        return (positions >= self.oldest) & (positions <= self.last)

    def visible(self, positions: Int32[Array, " tile"]) -> Bool[Array, "queries tile"]:
        """Returns whether each query sees each position."""
        visible = positions[None, :] <= self.newest_of[:, None]
        if self.window is not None:
            visible = visible & (positions[None, :] > (self.newest_of - self.window)[:, None])
        return visible


def _kernel(
    q_ref: jax.Ref,
    kv: Any,  # PagedKV and QueryBlocks of references
    blocks: Any,
    sinks_ref: jax.Ref | None,
    out_ref: jax.Ref,
    *,
    group_size: int,
    sizes: _Sizes,
    window: int | None,
    softcap: float | None,
):
    num_slots, head_dim = kv.page_ids.shape[0], q_ref.shape[2]
    padded_group = tiles.padded(group_size, 1)
    is_split = block_rows(group_size) * padded_group > sizes.queries
    kv_head, block = pl.program_id(0), pl.program_id(1)
    first_query = pl.program_id(2) * sizes.queries if is_split else jnp.int32(0)
    query = first_query + jnp.arange(sizes.queries, dtype=jnp.int32)
    row, member = lax.div(query, np.int32(padded_group)), lax.rem(query, np.int32(padded_group))
    head, is_head = kv_head * group_size + member, member < group_size
    dim = jnp.arange(tiles.padded(head_dim), dtype=jnp.int32)

    num_rows = blocks.num_rows[block]
    begin_row = lax.div(first_query, np.int32(padded_group))
    end_row = jnp.minimum(begin_row + max(sizes.queries // padded_group, 1), num_rows)
    is_element = ((row < num_rows) & is_head)[:, None] & (dim < head_dim)[None, :]

    def elements(first_row: Int32[Array, ""]) -> tuple[Int32[Array, "..."], ...]:
        return (first_row + row)[:, None], head[:, None], dim[None, :]

    @pl.when(begin_row < end_row)
    def _():
        slot, first_position = blocks.slot[block], blocks.first_position[block]
        first = jnp.where(slot < num_slots, first_position + begin_row, -1)
        last = jnp.where(slot < num_slots, first_position + end_row - 1, -1)
        oldest = jnp.int32(0) if window is None else jnp.maximum(first - (window - 1), 0)
        span = _Span(oldest, last, first_position + row, window)

        place = elements(blocks.first_row[block])
        q = plgpu.load(q_ref.at[place], mask=is_element, other=np.zeros((), q_ref.dtype))
        q = q.astype(jnp.float32) * np.float32(tiles.query_factor(softcap))
        if (
            kv.k_scale is not None
        ):  # not as a factor of scores, which one loop could fuse with what follows and another not
            q = q * kv.k_scale[kv_head]
        q = q.astype(tiles.compute_dtype(kv.k.dtype))

        page_ids_of = functools.partial(
            tiles.load_page_ids, kv.page_ids, slot, last=last, tile_size=sizes.tile, page_size=kv.k.shape[2]
        )

        def fold_tile(tile, carry, *, masked: bool):
            page_ids, softmax = carry
            next_page_ids = page_ids_of(tile + 1)
            positions = tiles.tile_positions(tile, sizes.tile)
            is_read = span.holds(positions) if masked else None
            k = tiles.load_tile(kv.k, page_ids, kv_head, positions, is_read)
            v = tiles.load_tile(kv.v, page_ids, kv_head, positions, is_read)
            scores = tiles.scores(q, k, None, softcap=softcap)
            if masked:
                scores, v = _masked(scores, v, span.visible(positions), kv.v.dtype)
            return next_page_ids, tiles.fold(softmax, scores, v)

        begin, whole_begin, whole_end, end = span.tile_bounds(first, sizes.tile)
        carry = page_ids_of(begin), tiles.empty_softmax(sizes.queries, head_dim)
        if window is not None:
            carry = lax.fori_loop(begin, whole_begin, functools.partial(fold_tile, masked=True), carry)
        # The condition keeps the loop from reaching its final wait for products without any: then the compiler serialises all.
        carry = lax.cond(
            whole_begin < whole_end,
            lambda carry: lax.fori_loop(whole_begin, whole_end, functools.partial(fold_tile, masked=False), carry),
            lambda carry: carry,
            carry,
        )
        _, softmax = lax.fori_loop(whole_end, end, functools.partial(fold_tile, masked=True), carry)

        sink = None if sinks_ref is None else plgpu.load(sinks_ref.at[head], mask=is_head, other=np.float32(0))
        out = tiles.finish(softmax, sink, None if kv.v_scale is None else kv.v_scale[kv_head])
        # Read again, so that the addresses do not stay in registers through the loops: at head_dim 256 that spills.
        place = elements(plgpu.load(blocks.first_row.at[block], volatile=True))
        plgpu.store(out_ref.at[place], out, mask=is_element)


def _masked(
    scores: Float32[Array, "queries tile"],
    v: Float[Array, "tile padded_D"],
    visible: Bool[Array, "queries tile"],
    pages_dtype: jnp.dtype,
) -> tuple[Float32[Array, "queries tile"], Float[Array, "tile padded_D"]]:
    """Returns scores that are -inf where not visible, and values that may be multiplied by weights of 0.

    0 times NaN is NaN, so a value that is not finite would reach queries that do not see it. It is replaced by 0, and the score
    of its position becomes NaN, which shows it to the queries that do see it.
    """
    if jnp.issubdtype(pages_dtype, jnp.floating):
        not_finite = jnp.sum((v - v).astype(jnp.float32), axis=1)  # 0 or NaN
        v = jnp.where((not_finite == 0)[:, None], v, 0)
        scores = scores + not_finite[None, :]
    return jnp.where(visible, scores, -jnp.inf), v
