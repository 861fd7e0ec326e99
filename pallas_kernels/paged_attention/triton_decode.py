"""Attention of single batch rows over pages on NVIDIA GPUs: Flash-Decoding (Dao et al., 2023) in Pallas, lowered to Triton.

One program works on one kv head of one batch row, and on one of the splits of the positions that the row sees. The query heads
of the kv head are the rows of its matrix products. A second kernel combines the splits; a single split needs none.

    a batch row at position 700, tiles of 64 positions, 4 splits:   |0 1 2|3 4 5|6 7 8|9 10|
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import triton_tiles as tiles
from pallas_kernels.pages import PagedKV

_NUM_SMS = 132  # multiprocessors of an H100 or H200 (SXM)
_PROGRAMS_PER_SM = 3  # so that some load while others compute
_MIN_TILES_PER_SPLIT = 4  # a split's partial result costs about as much as half a tile
_MAX_SPLITS = 128  # the combining kernel holds one row of each in registers
_MAX_GRID = 65535  # programs along the second dimension of a grid
COMBINED_DIMS = 64  # dimensions of the head per program of the second kernel


def decode_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    num_splits: int | None = None,
    interpret: bool = False,
) -> Float32[Array, "B H D"]:
    """Computes `reference.paged_attention`. Operands of products are rounded to `triton_tiles.compute_dtype`.

    The bits of a batch row depend on its own sequence and position, on `num_splits` and on static shapes only, because its
    own position decides where its splits begin.

    Args:
      q, kv, slot, position, window, softcap, sinks: as in the reference.
      num_splits: into how many parts, at most 128, the positions of a batch row are split; None: `default_num_splits`.
      interpret: whether to run in Pallas' interpreter.

    Raises:
      ValueError: if the shapes, the dtype of the pages or `num_splits` are not supported.
    """
    plan = plan_of(q, kv, window=window, num_splits=num_splits)
    num_rows, num_heads, head_dim = q.shape
    num_splits = plan.num_splits
    kv = kv._replace(k=tiles.kernel_pages(kv.k), v=tiles.kernel_pages(kv.v))
    splitting = {"window": window, "tile_size": plan.tile_size, "num_splits": num_splits}

    split = tiles.triton_call(
        functools.partial(_decode_kernel, heads_per_program=plan.heads_per_program, softcap=softcap, **splitting),
        grid=(plan.head_programs, num_rows, num_splits),
        out_shape=[plan.out_shape] if num_splits == 1 else plan.part_shapes,
        num_warps=4,
        num_stages=3,
        name="paged_decode",
        interpret=interpret,
    )
    parts = split(q, kv, slot, position, sinks)
    if num_splits == 1:
        return parts[0]
    combine = tiles.triton_call(
        functools.partial(_combine_kernel, num_slots=kv.num_slots, **splitting),
        grid=(num_heads, num_rows, -(-head_dim // COMBINED_DIMS)),
        out_shape=plan.out_shape,
        num_warps=4,
        num_stages=1,
        name="paged_decode_combine",
        interpret=interpret,
    )
    return combine(parts, slot, position, sinks, kv.v_scale)


class Plan(NamedTuple):
    """How decoding is cut into programs. All backends that split follow the same plan."""

    tile_size: int  # positions
    heads_per_program: int
    head_programs: int  # programs for all heads of a batch row
    num_splits: int
    q_shape: tuple[int, ...]  # [B, H, D]

    @property
    def out_shape(self) -> jax.ShapeDtypeStruct:
        """The attention output."""
        return jax.ShapeDtypeStruct(self.q_shape, jnp.float32)

    @property
    def part_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays that the first kernel stores for the second: largest scores, sums of weights, weighted sums of values."""
        *rows_and_heads, head_dim = self.q_shape
        shapes = ((self.num_splits,), (self.num_splits,), (self.num_splits, head_dim))
        return [jax.ShapeDtypeStruct((*rows_and_heads, *shape), jnp.float32) for shape in shapes]


def plan_of(q: Float[Array, "B H D"], kv: PagedKV, *, window: int | None, num_splits: int | None) -> Plan:
    """Checks the arguments of `decode_attention` and plans its programs.

    Raises:
      ValueError: if the shapes, the dtype of the pages or `num_splits` are not supported.
    """
    tiles.check_supported(q, kv)
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[1]
    tile_size = _tile_size(head_dim, kv.k.dtype)
    group_size = num_heads // num_kv_heads
    heads_per_program = min(tiles.padded(group_size), _max_heads_per_program(kv.k.dtype))
    head_programs = num_kv_heads * -(-group_size // heads_per_program)
    if num_splits is None:
        longest = kv.page_ids.shape[1] * kv.page_size
        longest = longest if window is None else min(longest, window)
        num_splits = default_num_splits(head_programs * num_rows, -(-longest // tile_size))
    if not 1 <= num_splits <= _MAX_SPLITS:
        raise ValueError(f"num_splits {num_splits} is not in 1..{_MAX_SPLITS}: choose it there, or None")
    if num_rows > _MAX_GRID:
        raise ValueError(f"{num_rows} batch rows are more than {_MAX_GRID}: use a smaller batch")
    return Plan(tile_size, heads_per_program, head_programs, num_splits, q.shape)


def default_num_splits(num_programs: int, max_tiles: int) -> int:
    """Returns enough splits to fill the GPU when all batch rows are long, and no more than the longest one can use.

    Both arguments are static. If the splits followed from the batch rows present, the bits of one would depend on the others.

    Args:
      num_programs: how many programs there are without splitting.
      max_tiles: how many tiles the longest batch row can see.
    """
    filling = -(-_PROGRAMS_PER_SM * _NUM_SMS // num_programs)
    useful = max(max_tiles // _MIN_TILES_PER_SPLIT, 1)
    return min(tiles.padded(filling, 1), 1 << (useful.bit_length() - 1), _MAX_SPLITS)


# With these sizes, 4 warps and 3 stages, no named shape spills registers on sm_90a and sm_80, and keys and values have two
# buffers each that are filled ahead. Products of float32 use no tensor cores and spill sooner.


def _tile_size(head_dim: int, dtype: jnp.dtype) -> int:
    if dtype == jnp.float32:
        return 64 if head_dim <= 64 else 16
    return 64 if head_dim <= 128 else 32


def _max_heads_per_program(dtype: jnp.dtype) -> int:
    return 16 if dtype == jnp.float32 else 32


def _last_seen(slot: Int32[Array, ""], position: Int32[Array, ""], num_slots: int) -> Int32[Array, ""]:
    """Returns the last position that a batch row sees. Without a slot it is -1, so that no page id is read."""
    return jnp.where(slot < num_slots, position, -1)


def _split_tiles(
    last: Int32[Array, ""], *, window: int | None, tile_size: int, num_splits: int
) -> tuple[Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]]:
    """Returns the first tile that a batch row sees, the tile after its last one, and the tiles per split."""
    oldest = jnp.zeros_like(last) if window is None else jnp.maximum(last - (window - 1), 0)
    first = lax.div(oldest, np.int32(tile_size))
    end = lax.div(last + tile_size, np.int32(tile_size))
    return first, end, lax.div(end - first + (num_splits - 1), np.int32(num_splits))


def _decode_kernel(
    q_ref, kv, slot_ref, position_ref, sinks_ref, *out_refs, heads_per_program, window, softcap, tile_size, num_splits
):
    num_slots, (_, num_kv_heads, page_size, head_dim) = kv.page_ids.shape[0], kv.k.shape
    group_size = q_ref.shape[1] // num_kv_heads
    programs_per_kv_head = -(-group_size // heads_per_program)
    kv_head = lax.div(pl.program_id(0), np.int32(programs_per_kv_head))
    member = lax.rem(pl.program_id(0), np.int32(programs_per_kv_head)) * heads_per_program
    member = member + jnp.arange(heads_per_program, dtype=jnp.int32)
    head, is_head = kv_head * group_size + member, member < group_size
    row, split = pl.program_id(1), pl.program_id(2)
    dim = jnp.arange(tiles.padded(head_dim), dtype=jnp.int32)
    is_element = is_head[:, None] & (dim < head_dim)[None, :]

    slot = slot_ref[row]
    last = _last_seen(slot, position_ref[row], num_slots)
    first, end, per_split = _split_tiles(last, window=window, tile_size=tile_size, num_splits=num_splits)
    first = first + split * per_split
    end = jnp.minimum(first + per_split, end)

    def attend() -> tiles.Softmax:
        q = plgpu.load(q_ref.at[row, head[:, None], dim[None, :]], mask=is_element, other=np.zeros((), q_ref.dtype))
        q = (q.astype(jnp.float32) * tiles.query_factor(softcap)).astype(tiles.compute_dtype(kv.k.dtype))
        k_scale = None if kv.k_scale is None else kv.k_scale[kv_head]
        page_ids_of = functools.partial(
            tiles.load_page_ids, kv.page_ids, slot, last=last, tile_size=tile_size, page_size=page_size
        )

        def fold_tile(tile, carry):
            page_ids, softmax = carry
            next_page_ids = page_ids_of(tile + 1)
            key_positions = tiles.tile_positions(tile, tile_size)
            visible = key_positions <= last
            if window is not None:
                visible = visible & (key_positions > last - window)
            k = tiles.load_tile(kv.k, page_ids, kv_head, key_positions, visible)
            v = tiles.load_tile(kv.v, page_ids, kv_head, key_positions, visible)
            scores = tiles.scores(q, k, visible[None, :], k_scale=k_scale, softcap=softcap)
            return next_page_ids, tiles.fold(softmax, scores, v)

        carry = page_ids_of(first), tiles.empty_softmax(heads_per_program, head_dim)
        return lax.fori_loop(first, end, fold_tile, carry)[1]

    if num_splits == 1:
        sink = None if sinks_ref is None else plgpu.load(sinks_ref.at[head], mask=is_head, other=np.float32(0))
        out = tiles.finish(attend(), sink, None if kv.v_scale is None else kv.v_scale[kv_head])
        (out_ref,) = out_refs
        plgpu.store(out_ref.at[row, head[:, None], dim[None, :]], out, mask=is_element)
        return

    @pl.when(first < end)  # `_combine_kernel` reads only these
    def _():
        softmax = attend()
        largest_ref, total_ref, out_ref = out_refs
        plgpu.store(largest_ref.at[row, head, split], softmax.largest, mask=is_head)
        plgpu.store(total_ref.at[row, head, split], softmax.total, mask=is_head)
        plgpu.store(out_ref.at[row, head[:, None], split, dim[None, :]], softmax.out, mask=is_element)


def _combine_kernel(
    part_refs, slot_ref, position_ref, sinks_ref, v_scale_ref, out_ref, *, num_slots, window, tile_size, num_splits
):
    head, row = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[2]
    block = min(tiles.padded(head_dim), COMBINED_DIMS)
    dim = pl.program_id(2) * block + jnp.arange(block, dtype=jnp.int32)
    split = jnp.arange(tiles.padded(num_splits, 1), dtype=jnp.int32)

    last = _last_seen(slot_ref[row], position_ref[row], num_slots)
    first, end, per_split = _split_tiles(last, window=window, tile_size=tile_size, num_splits=num_splits)
    is_used = (first + split * per_split < end) & (split < num_splits)
    is_element = is_used[:, None] & (dim < head_dim)[None, :]
    largest_ref, total_ref, part_out_ref = part_refs
    largest = plgpu.load(largest_ref.at[row, head, split], mask=is_used, other=np.float32(-np.inf))
    total = plgpu.load(total_ref.at[row, head, split], mask=is_used, other=np.float32(0))
    out = plgpu.load(part_out_ref.at[row, head, split[:, None], dim[None, :]], mask=is_element, other=np.float32(0))

    overall = jnp.max(largest, axis=0, keepdims=True)
    correction = jnp.exp2(largest - tiles.finite_base(overall))
    softmax = tiles.Softmax(
        largest=overall,
        total=jnp.sum(total * correction, axis=0, keepdims=True),
        out=jnp.sum(out * correction[:, None], axis=0, keepdims=True),
    )
    sink = None if sinks_ref is None else sinks_ref[head][None]
    v_scale = None
    if v_scale_ref is not None:
        group_size = out_ref.shape[1] // v_scale_ref.shape[0]
        v_scale = v_scale_ref[lax.div(head, np.int32(group_size))]
    plgpu.store(out_ref.at[row, head, dim], tiles.finish(softmax, sink, v_scale)[0], mask=dim < head_dim)
