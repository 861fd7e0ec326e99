"""Attention for TPUs (Pallas, Mosaic) of batch rows that each read the pages of their slot separately."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import tpu_tiles
from pallas_kernels.paged_attention.tpu_tiles import NUM_BUFFERS, Schedule, SoftmaxState, Tiles
from pallas_kernels.pages import PagedKV

# Size of K and V together: about a microsecond of HBM bandwidth, far above the fixed cost of a copy.
_TILE_BYTES = 2**20
_MIN_TILE, _MAX_TILE = 128, 512  # lanes of the scores; a short sequence is rounded up to the first
_BUFFER_BYTES = 2**23  # half of the VMEM that a kernel gets
_SUBLANES = 8


def decode_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    interpret: bool = False,
) -> Float32[Array, "B H D"]:
    """Computes `reference.paged_attention` with one grid step per batch row, whose work follows the length of that row.

    All kv heads of a tile are computed together, so that one copy per page brings them all. Operands of products are bfloat16
    unless the pages are float32. A group is padded to 8 queries in VMEM.

    If head_dim is no multiple of 128, XLA by default keeps another dimension of the pages minor, and copies the whole pool
    for this kernel. Give the arrays of the pool the row-major layout (`jax.experimental.layout`) to avoid that.

    Raises:
      ValueError: if the pages' dtype, head_dim, page size or the size of the page table is not supported.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, group = kv.k.shape[1], num_heads // kv.k.shape[1]
    tpu_tiles.check_supported(q, kv, len(Schedule._fields) * num_rows)
    size = _tile_size(kv)
    group_padding = (0, -group % _SUBLANES)
    q = jnp.pad(tpu_tiles.grouped_queries(q, kv), ((0, 0), (0, 0), group_padding, (0, 0)))
    sinks = jnp.full(num_heads, -jnp.inf, jnp.float32) if sinks is None else sinks
    sinks = jnp.pad(sinks.reshape(num_kv_heads, group), ((0, 0), group_padding))[:, :, None]
    oldest = jnp.zeros_like(position) if window is None else jnp.maximum(position - (window - 1), 0)
    schedule = tpu_tiles.make_schedule(slot, oldest, position, num_slots=kv.num_slots, tile_size=size)
    row_block = pl.BlockSpec((1, *q.shape[1:]), lambda row, *_: (row, 0, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    buffers = pltpu.VMEM((NUM_BUFFERS, num_kv_heads, size, head_dim), kv.k.dtype)
    out = pl.pallas_call(
        functools.partial(_kernel, num_slots=kv.num_slots, softcap=softcap, operand_dtype=tpu_tiles.compute_dtype(kv)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule) + 1,
            grid=(num_rows,),
            in_specs=[row_block, pl.BlockSpec(sinks.shape, lambda *_: (0, 0, 0)), in_hbm, in_hbm],
            out_specs=row_block,
            scratch_shapes=[
                buffers,
                buffers,
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
                pltpu.VMEM(sinks.shape, jnp.float32),
                pltpu.VMEM(sinks.shape, jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),  # copies cross from row to row
        interpret=tpu_tiles.interpreted(interpret),
        name="paged_decode_attention",
    )(*schedule, kv.page_ids.reshape(-1), q, sinks, tpu_tiles.in_hbm(kv.k), tpu_tiles.in_hbm(kv.v))
    out = out[:, :, :group]
    if kv.v_scale is not None:
        out = out * kv.v_scale[None, :, None, None]
    return out.reshape(num_rows, num_heads, head_dim)


def _tile_size(kv: PagedKV) -> int:
    """Returns the positions per tile, from static shapes only. 8-bit numbers count as what they are converted to in VMEM."""
    _, num_kv_heads, _, head_dim = kv.k.shape
    position_bytes = 2 * num_kv_heads * tpu_tiles.padded_head_dim(head_dim) * tpu_tiles.compute_dtype(kv).itemsize
    size = min(max(_TILE_BYTES // position_bytes, _MIN_TILE), _MAX_TILE)
    size = min(size, _BUFFER_BYTES // (NUM_BUFFERS * position_bytes))
    return 1 << (size.bit_length() - 1)


def _kernel(
    slot, oldest, newest, tiles_before, next_item, page_ids,  # scalars
    q, sinks, k_pages, v_pages, out,
    k_tiles, v_tiles, copied, largest, total,  # scratch
    *, num_slots, softcap, operand_dtype,
):  # fmt: skip
    row = pl.program_id(0)
    schedule = Schedule(slot, oldest, newest, tiles_before, next_item)
    pages_per_slot = page_ids.shape[0] // num_slots
    tiles = Tiles(schedule, page_ids, pages_per_slot, k_pages, v_pages, k_tiles, v_tiles, copied)
    state = SoftmaxState(largest, total, out.at[0])

    @pl.when(slot[row] == num_slots)
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(slot[row] < num_slots)
    def _():
        state.start(sinks[...])
        queries = q[0].astype(operand_dtype)

        def fold(k_tile, v_tile, first_position):
            first, last = oldest[row], newest[row]

            @pl.when((first_position < first) | (first_position + tiles.tile_size - 1 > last))
            def _():
                _clear_unseen(v_tile, first_position, first, last)

            positions = first_position + lax.broadcasted_iota(jnp.int32, (1, 1, tiles.tile_size), 2)
            k, v = (tpu_tiles.as_operand(tile[...], operand_dtype) for tile in (k_tile, v_tile))
            state.fold(queries, k, v, (positions >= first) & (positions <= last), softcap)

        tiles.for_each(row, lambda _: 0, fold)
        state.finish()


def _clear_unseen(tile, first_position, first, last) -> None:
    """Sets values at positions that the batch row does not see to 0, because 0 times NaN is NaN."""
    if tile.dtype == jnp.int8:  # int8 has no NaN
        return
    positions = first_position + lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    values = tpu_tiles.as_operand(tile[...], jnp.dtype(jnp.float32))
    seen = (positions >= first) & (positions <= last)
    tile[...] = tpu_tiles.as_stored(jnp.where(seen, values, 0.0), tile.dtype)
