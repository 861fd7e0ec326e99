"""Attention of chunks for TPUs (Pallas, Mosaic): the batch rows of a query block read the pages of their slot together.

Batch rows lie in units of a few rows, so that a block can start at any batch row while copies to and from VMEM start at whole
registers. Plain JAX gathers the batch rows into units before the kernel, and out of them after it:

blocks of rows  0-4, 5-6, (7: no slot), 8-12        units of 4 rows:  [0 1 2 3] [4 . . .] [5 6 . .] [8 9 10 11] [12 . . .]
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import tpu_tiles
from pallas_kernels.paged_attention.query_blocks import QueryBlocks
from pallas_kernels.paged_attention.tpu_tiles import LANES, NUM_BUFFERS, Schedule, SoftmaxState, Tiles
from pallas_kernels.pages import PagedKV

_TILE_SIZE = 256  # positions
_SUBLANES = 8
_PACKED_SUBLANES = 16  # rows of bfloat16 in a register
_UNIT_QUERIES = 32  # small units waste few rows at the end of a block, large ones need fewer copies
_PART_QUERIES = 128  # rows of one product, the size of the MXU; a short block is rounded up to it
_BLOCK_QUERIES = 512  # operations per byte of pages, about as many as the fastest chip needs for its bandwidth
_VMEM_BYTES = 10 * 2**20  # budget, of the 16 MiB of VMEM that a kernel gets


def block_rows(group_size: int) -> int:
    """Returns the most batch rows per query block."""
    return _Rows.of(group_size).per_block


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
    """Computes `reference.paged_attention` for the batch rows in `blocks`. Batch rows in no block give 0.

    There is one grid step per block and group of kv heads that fits in VMEM. Operands of products are bfloat16 unless the pages
    are float32. A batch row that sees a value that is not finite is NaN in all elements of that value's heads; others keep
    their bits. `tpu_decode.decode_attention` says what to do if head_dim is no multiple of 128.

    Raises:
      ValueError: if the pages' dtype, head_dim, page size or the size of the page table is not supported.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, group_size = kv.k.shape[1], num_heads // kv.k.shape[1]
    rows = _Rows.of(group_size)
    steps_per_block = num_kv_heads // _heads_per_step(kv, rows)
    num_items = blocks.slot.shape[0] * steps_per_block
    tpu_tiles.check_supported(q, kv, len(Schedule._fields) * num_items + 3 * blocks.slot.shape[0])
    layout = _layout(blocks, num_rows, kv.num_slots, rows)
    q = tpu_tiles.grouped_queries(q, kv).astype(tpu_tiles.compute_dtype(kv))
    q = q.at[layout.row].get(mode="fill", fill_value=0).transpose(1, 0, 2, 3)
    q = q.reshape(num_kv_heads, -1, rows.per_unit * group_size, head_dim)
    sinks = jnp.full(num_heads, -jnp.inf, jnp.float32) if sinks is None else sinks
    sinks = jnp.tile(sinks.reshape(num_kv_heads, group_size), rows.per_part)[:, :, None]
    newest = blocks.first_position + blocks.num_rows - 1
    oldest = jnp.zeros_like(newest) if window is None else jnp.maximum(blocks.first_position - (window - 1), 0)
    spans = (jnp.repeat(x, steps_per_block) for x in (blocks.slot, oldest, newest))
    schedule = tpu_tiles.make_schedule(*spans, num_slots=kv.num_slots, tile_size=_TILE_SIZE)
    scalars = (*schedule, kv.page_ids.reshape(-1), layout.first_unit, blocks.num_rows, blocks.first_position)
    out = _attend_units(scalars, q, sinks, kv, rows=rows, window=window, softcap=softcap, interpret=interpret)
    out = out.reshape(num_kv_heads, -1, group_size, head_dim).transpose(1, 0, 2, 3)
    out = out.at[layout.place].get(mode="fill", fill_value=0)
    if kv.v_scale is not None:
        out = out * kv.v_scale[None, :, None, None]
    return out.reshape(num_rows, num_heads, head_dim)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How batch rows are put together. A batch row has `group_size` queries per kv head."""

    group_size: int
    per_unit: int  # batch rows that are copied out together
    per_part: int  # batch rows that one product works on
    per_block: int  # batch rows that read a tile together

    @classmethod
    def of(cls, group_size: int) -> "_Rows":
        step = _PACKED_SUBLANES // math.gcd(_PACKED_SUBLANES, group_size)
        unit = step * -(-_UNIT_QUERIES // (step * group_size))
        part = unit * max(_PART_QUERIES // (unit * group_size), 1)
        return cls(group_size, unit, part, part * max(_BLOCK_QUERIES // (part * group_size), 1))


def _heads_per_step(kv: PagedKV, rows: _Rows) -> int:
    """Returns how many kv heads a grid step works on: the largest divisor of all whose tiles and state fit in VMEM."""
    _, num_kv_heads, _, head_dim = kv.k.shape
    lanes, queries = tpu_tiles.padded_head_dim(head_dim), rows.per_block * rows.group_size
    tiles = 2 * NUM_BUFFERS * _TILE_SIZE * lanes * kv.k.dtype.itemsize
    block = queries * (lanes * (2 * tpu_tiles.compute_dtype(kv).itemsize + 4) + 2 * LANES * 4)
    most = max(_VMEM_BYTES // (tiles + block), 1)
    return max(heads for heads in range(1, num_kv_heads + 1) if num_kv_heads % heads == 0 and heads <= most)


class _Layout(NamedTuple):
    """Where the batch rows lie in units."""

    first_unit: Int32[Array, " X"]
    row: Int32[Array, " U"]  # batch row in each place; B: none
    place: Int32[Array, " B"]  # place of each batch row; U: none


def _layout(blocks: QueryBlocks, num_rows: int, num_slots: int, rows: _Rows) -> _Layout:
    num_blocks = blocks.slot.shape[0]
    # All units of the last block are read, in use or not.
    num_units = -(-num_rows // rows.per_unit) + num_blocks + rows.per_block // rows.per_unit
    num_places = num_units * rows.per_unit
    used = jnp.where(blocks.slot < num_slots, blocks.num_rows, 0)
    units = lax.div(used + (rows.per_unit - 1), jnp.int32(rows.per_unit))
    first_unit = jnp.cumsum(units) - units
    row = jnp.arange(num_rows, dtype=jnp.int32)
    block = jnp.cumsum(jnp.zeros(num_rows, jnp.int32).at[blocks.first_row].set(1, mode="drop")) - 1
    place = first_unit[block] * rows.per_unit + row - blocks.first_row[block]
    place = jnp.where(row - blocks.first_row[block] < used[block], place, num_places)
    return _Layout(first_unit, jnp.full(num_places, num_rows, jnp.int32).at[place].set(row, mode="drop"), place)


def _attend_units(
    scalars: tuple[Int32[Array, " _"], ...],
    q: Float[Array, "K U M D"],
    sinks: Float32[Array, "K M 1"],
    kv: PagedKV,
    *,
    rows: "_Rows",
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Float32[Array, "K U M D"]:
    """Computes attention for queries in units. Units that belong to no block are not written."""
    *_, num_rows, _ = scalars
    heads, head_dim = _heads_per_step(kv, rows), q.shape[3]
    steps_per_block = q.shape[0] // heads
    num_parts, part_queries = rows.per_block // rows.per_part, rows.per_part * rows.group_size
    buffers = pltpu.VMEM((NUM_BUFFERS, heads, _TILE_SIZE, head_dim), kv.k.dtype)
    state = pltpu.VMEM((heads, num_parts, part_queries, 1), jnp.float32)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    def q_index(item, *scalars):
        first_unit = scalars[-3]
        return lax.rem(item, steps_per_block) * heads, first_unit[lax.div(item, steps_per_block)], 0, 0

    return pl.pallas_call(
        functools.partial(_kernel, num_slots=kv.num_slots, window=window, softcap=softcap, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(jnp.sum(num_rows > 0, dtype=jnp.int32) * steps_per_block,),  # blocks in use come first
            in_specs=[
                pl.BlockSpec(
                    tuple(map(pl.Element, (heads, rows.per_block // rows.per_unit, q.shape[2], head_dim))), q_index
                ),
                pl.BlockSpec((heads, *sinks.shape[1:]), lambda item, *_: (lax.rem(item, steps_per_block), 0, 0)),
                in_hbm,
                in_hbm,
            ],
            out_specs=in_hbm,
            scratch_shapes=[
                buffers,
                buffers,
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
                pltpu.VMEM((heads, _SUBLANES, _TILE_SIZE), jnp.float32),
                state,
                state,
                pltpu.VMEM((heads, num_parts, part_queries, head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=pltpu.HBM(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),  # copies cross from item to item
        interpret=tpu_tiles.interpreted(interpret),
        name="paged_chunk_attention",
    )(*scalars, q, sinks, tpu_tiles.in_hbm(kv.k), tpu_tiles.in_hbm(kv.v))


def _kernel(
    slot, oldest, newest, tiles_before, next_item, page_ids, first_unit, num_rows, first_position,  # scalars
    q, sinks, k_pages, v_pages, out,
    k_tiles, v_tiles, copied, broken, largest, total, out_block, written,  # scratch
    *, num_slots, window, softcap, rows,
):  # fmt: skip
    units_per_part = rows.per_part // rows.per_unit
    item = pl.program_id(0)
    heads, _, part_queries, _ = largest.shape
    steps_per_block = k_pages.shape[1] // heads
    block = lax.div(item, steps_per_block)
    pages_per_slot = page_ids.shape[0] // num_slots
    schedule = Schedule(slot, oldest, newest, tiles_before, next_item)
    tiles = Tiles(schedule, page_ids, pages_per_slot, k_pages, v_pages, k_tiles, v_tiles, copied)
    begin, num_parts = first_position[block], lax.div(num_rows[block] + (rows.per_part - 1), rows.per_part)

    def first_head(item):
        return lax.rem(item, steps_per_block) * heads

    def for_each_part(first, end, act):
        def body(part, _):
            lax.fori_loop(0, heads, lambda head, _: act(head, part) or 0, 0)
            return 0

        lax.fori_loop(first, end, body, 0)

    def state(head, part):
        return SoftmaxState(*(ref.at[head, part] for ref in (largest, total, out_block)))

    def fold(k_tile, v_tile, tile_position):
        """Adds a tile to the parts that see some of it. To the others it would add nothing."""
        last_position = tile_position + tiles.tile_size - 1
        sees_all = begin >= last_position
        if window is not None:
            sees_all &= tile_position > newest[item] - window

        @pl.when(~sees_all)
        def _():
            span = oldest[item], newest[item]
            lax.fori_loop(0, heads, lambda head, _: _take_out_broken(v_tile, broken, head, tile_position, span), 0)

        keys = tile_position + lax.broadcasted_iota(jnp.int32, (1, tiles.tile_size), 1)
        row_of_query = lax.div(lax.broadcasted_iota(jnp.int32, (part_queries, 1), 0), rows.group_size)

        def fold_part(head, part):
            positions = begin + part * rows.per_part + row_of_query
            visible = keys <= jnp.minimum(positions, newest[item])
            if window is not None:
                visible &= keys > positions - window
            units = pl.ds(part * units_per_part, units_per_part)
            queries = q[head, units].reshape(part_queries, q.shape[3])
            k, v = (tpu_tiles.as_operand(tile[head], q.dtype) for tile in (k_tile, v_tile))
            state(head, part).fold(queries, k, v, visible, softcap, jnp.where(sees_all, 0.0, broken[head, :1]))

        first = lax.div(jnp.maximum(tile_position - begin, 0), rows.per_part)
        end = num_parts
        if window is not None:
            end = jnp.minimum(end, lax.div(last_position + (window - 1) - begin, rows.per_part) + 1)
        for_each_part(first, end, fold_part)

    @pl.when(slot[item] < num_slots)
    def _():
        for_each_part(0, num_parts, lambda head, part: state(head, part).start(sinks[head]))
        tiles.for_each(item, first_head, fold)
        for_each_part(0, num_parts, lambda head, part: state(head, part).finish())
        unit_queries, num_units = q.shape[2], lax.div(num_rows[block] + (rows.per_unit - 1), rows.per_unit)

        def for_each_unit(act):
            def body(unit, _):
                place = pl.multiple_of(lax.rem(unit, units_per_part) * unit_queries, unit_queries)
                source = out_block.at[:, lax.div(unit, units_per_part), pl.ds(place, unit_queries)]
                target = out.at[pl.ds(first_head(item), heads), first_unit[block] + unit]
                act(pltpu.make_async_copy(source, target, written))
                return 0

            lax.fori_loop(0, num_units, body, 0)

        for_each_unit(lambda copy: copy.start())
        for_each_unit(lambda copy: copy.wait())


def _take_out_broken(tile, broken, head, tile_position, span):
    """Replaces values that are not finite by 0 at positions that not all rows see, and writes to `broken` where they were."""
    if tile.dtype == jnp.int8:  # int8 is always finite
        broken[head] = jnp.zeros(broken.shape[1:], jnp.float32)
        return 0
    values = tpu_tiles.as_operand(tile[head], jnp.dtype(jnp.float32))
    positions = tile_position + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    read = (positions >= span[0]) & (positions <= span[1])
    zeros = values - values  # NaN where a value is not finite
    tile[head] = tpu_tiles.as_stored(jnp.where(read & (zeros == 0), values, 0.0), tile.dtype)
    ones = jnp.ones((broken.shape[1], values.shape[1]), jnp.bfloat16)
    broken[head] = lax.dot_general(  # sums over lanes whose results lie along lanes
        ones,
        jnp.where(read, zeros, 0.0).astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    return 0
