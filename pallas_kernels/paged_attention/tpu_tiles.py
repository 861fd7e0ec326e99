"""What both attention kernels for TPUs are made of: a schedule, tiles of positions read from pages, the running softmax.

A kernel's grid is a list of items, each the work of one query row or query block over a span of positions of one slot. The
span is gone through in tiles that start at absolute multiples of a fixed number of positions. One buffer is computed on while
the other is filled by asynchronous copies, one per page and array, also across items:

item 0: tiles 0 1 2      buffers 0 1 0
item 1: tile  5                  1        its copies start while tile 2 of item 0 is computed on
item 2: (no slot)
item 3: tiles 0 1                0 1

Only pages with a position of the span are read, so no "none" is looked up. What else a buffer holds is stale.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.pages import PagedKV

NUM_BUFFERS = 2
LANES = 128
_MAX_HEAD_DIM = 256
_MIN_PAGE_SIZE = 8
_PAGE_DTYPES = ("float32", "bfloat16", "uint16", "int8", "float8_e4m3fn", "float8_e5m2")
_SCALAR_MEMORY_BYTES = 2**20
_SCALAR_MEMORY_RESERVE = 2**14  # for the compiler


class Schedule(NamedTuple):
    """What a kernel's items work on, in scalar memory."""

    slot: Int32[Array, " I"]  # S = none
    oldest: Int32[Array, " I"]  # first position of the span
    newest: Int32[Array, " I"]  # last position of the span
    tiles_before: Int32[Array, " I"]  # of all items before; its parity says in which buffer the item starts
    next_item: Int32[Array, " I"]  # the next one with a slot; I = none


def make_schedule(
    slot: Int32[Array, " I"],
    oldest: Int32[Array, " I"],
    newest: Int32[Array, " I"],
    *,
    num_slots: int,
    tile_size: int,
) -> Schedule:
    (num_items,) = slot.shape
    works = slot < num_slots
    num_tiles = lax.div(newest, jnp.int32(tile_size)) - lax.div(oldest, jnp.int32(tile_size)) + 1
    num_tiles = jnp.where(works, num_tiles, 0)
    candidates = jnp.where(works, jnp.arange(num_items, dtype=jnp.int32), num_items)
    next_item = lax.cummin(jnp.append(candidates[1:], jnp.int32(num_items)), reverse=True)
    return Schedule(slot, oldest, newest, jnp.cumsum(num_tiles) - num_tiles, next_item)


def check_supported(q: Float[Array, "B H D"], kv: PagedKV, num_scalars: int) -> None:
    """Refuses what the kernels are not made for.

    Args:
      q, kv: of the attention.
      num_scalars: that a kernel wants in scalar memory beside the page table.

    Raises:
      ValueError: naming the value, the rule and the remedy.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = kv.k.shape
    if kv.v.shape != kv.k.shape or kv.v.dtype != kv.k.dtype:
        raise ValueError(
            f"pages of keys are {kv.k.dtype}{list(kv.k.shape)}, of values {kv.v.dtype}{list(kv.v.shape)}: make them alike"
        )
    if kv.k.dtype.name not in _PAGE_DTYPES:
        raise ValueError(
            f"pages of {kv.k.dtype.name} are not supported on TPUs: use one of {', '.join(_PAGE_DTYPES)}, "
            "or backend 'reference'"
        )
    if head_dim != kv.k.shape[3]:
        raise ValueError(f"head_dim of queries is {head_dim}, of pages {kv.k.shape[3]}: make them alike")
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {_MAX_HEAD_DIM}: use backend 'reference'")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads: repeat kv heads")
    if page_size < _MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is no power of two of at least {_MIN_PAGE_SIZE}: choose one")
    num_bytes, available = 4 * (kv.page_ids.size + num_scalars), _SCALAR_MEMORY_BYTES - _SCALAR_MEMORY_RESERVE
    if num_bytes > available:
        raise ValueError(
            f"a page table of {list(kv.page_ids.shape)} and {num_scalars} numbers about rows take {num_bytes} bytes of scalar "
            f"memory, above the {available} of a TPU: use larger pages, fewer slots, shorter sequences or fewer rows"
        )


def compute_dtype(kv: PagedKV) -> jnp.dtype:
    """Of the operands of products: that of the MXU, which holds 8-bit numbers exactly, but float32 for float32."""
    return jnp.dtype(jnp.float32 if kv.k.dtype == jnp.float32 else jnp.bfloat16)


def padded_head_dim(head_dim: int) -> int:
    """Lanes that a head takes in VMEM."""
    return -(-head_dim // LANES) * LANES


def in_hbm(pages: Shaped[Array, "N K T D"]) -> Shaped[Array, "N K T D"]:
    """Keeps XLA from staging a small pool in VMEM, as a whole; outside of jit there is no way to tell it."""
    if not isinstance(pages, jax.core.Tracer):
        return pages
    return pltpu.with_memory_space_constraint(pages, pltpu.HBM)


def interpreted(interpret: bool) -> bool | pltpu.InterpretParams:
    """The interpreter that models copies and semaphores; memory that nothing was written to is NaN in it."""
    return pltpu.InterpretParams() if interpret else False


def grouped_queries(q: Float[Array, "B H D"], kv: PagedKV) -> Float32[Array, "B K G D"]:
    """Queries by kv head, times the scale of its keys."""
    q = q.astype(jnp.float32).reshape(q.shape[0], kv.k.shape[1], -1, q.shape[2])
    return q if kv.k_scale is None else q * kv.k_scale[None, :, None, None]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Reads the tiles of a schedule's items. All but `pages_per_slot` are references inside a kernel.

    Attributes:
      schedule: of the items.
      page_ids: the page table, flat: P entries per slot.
      pages_per_slot: P.
      k_pages, v_pages: in HBM, [N, K, T, D].
      k_tiles, v_tiles: the buffers in VMEM, [2, heads, tile size, D].
      copied: a semaphore per buffer.
    """

    schedule: Schedule
    page_ids: jax.Ref
    pages_per_slot: int
    k_pages: jax.Ref
    v_pages: jax.Ref
    k_tiles: jax.Ref
    v_tiles: jax.Ref
    copied: jax.Ref

    @property
    def tile_size(self) -> int:
        return self.k_tiles.shape[2]

    def for_each(self, item, first_head: Callable, fold: Callable) -> None:
        """Calls `fold(k_tile, v_tile, first_position)` for the item's tiles in order, each in VMEM by then.

        Args:
          item: with a slot; items are gone through in ascending order, each once.
          first_head: of the kv heads that an item works on, as a function of the item.
          fold: gets references to [heads, tile size, D], in which positions outside the item's span hold anything.
        """
        schedule, size = self.schedule, jnp.int32(self.tile_size)
        oldest, newest, next_item = schedule.oldest[item], schedule.newest[item], schedule.next_item[item]
        first, last = lax.div(oldest, size), lax.div(newest, size)

        @pl.when(schedule.tiles_before[item] == 0)
        def _():
            self._for_each_copy(item, first_head(item), first, 0, lambda copy: copy.start())

        def body(tile, _):
            buffer = lax.rem(schedule.tiles_before[item] + tile - first, NUM_BUFFERS)

            @pl.when(tile < last)
            def _():
                self._for_each_copy(item, first_head(item), tile + 1, 1 - buffer, lambda copy: copy.start())

            @pl.when((tile == last) & (next_item < schedule.slot.shape[0]))
            def _():
                next_first = lax.div(schedule.oldest[next_item], size)
                self._for_each_copy(next_item, first_head(next_item), next_first, 1 - buffer, lambda copy: copy.start())

            self._for_each_copy(item, first_head(item), tile, buffer, lambda copy: copy.wait())
            fold(self.k_tiles.at[buffer], self.v_tiles.at[buffer], tile * size)
            return 0

        lax.fori_loop(first, last + 1, body, 0)

    def _for_each_copy(self, item, first_head, tile, buffer, act: Callable) -> None:
        """One copy per page for all heads at once: the page's heads are adjacent in HBM."""
        page_size, num_heads = self.k_pages.shape[2], self.k_tiles.shape[1]
        unit = min(page_size, self.tile_size)
        slot, oldest, newest = (ref[item] for ref in self.schedule[:3])
        begin = jnp.maximum(tile * self.tile_size, oldest)
        end = jnp.minimum((tile + 1) * self.tile_size - 1, newest)

        def body(index, _):
            position = index * unit
            page = self.page_ids[slot * self.pages_per_slot + lax.div(position, page_size)]
            page = jnp.minimum(page, self.k_pages.shape[0] - 1)  # a wrong table must not stop the device
            offset = 0 if unit == page_size else pl.multiple_of(lax.rem(position, page_size), unit)
            place = pl.multiple_of(lax.rem(position, self.tile_size), unit)
            for pages, tiles in ((self.k_pages, self.k_tiles), (self.v_pages, self.v_tiles)):
                source = pages.at[page, pl.ds(first_head, num_heads), pl.ds(offset, unit)]
                act(pltpu.make_async_copy(source, tiles.at[buffer, :, pl.ds(place, unit)], self.copied.at[buffer]))
            return 0

        lax.fori_loop(lax.div(begin, unit), lax.div(end, unit) + 1, body, 0)


def as_operand(stored: Array, dtype: jnp.dtype) -> Array:
    """Stored numbers as an operand of a product."""
    if stored.dtype == jnp.uint16:
        stored = pltpu.bitcast(stored, jnp.bfloat16)
    return stored.astype(dtype)


def as_stored(values: Float32[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """Back to what `as_operand` makes float32 of."""
    if dtype == jnp.uint16:
        return pltpu.bitcast(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


class SoftmaxState(NamedTuple):
    """References to the running softmax of query rows M."""

    largest: jax.Ref  # [..., M, 1]
    total: jax.Ref  # [..., M, 1], sum of weights relative to `largest`
    out: jax.Ref  # [..., M, D], sum of weighted values

    def start(self, sinks: Float32[Array, "... M 1"]) -> None:
        """A sink (-inf: none) is a score of which the sum of values is 0."""
        self.largest[...] = sinks
        self.total[...] = jnp.where(sinks == -jnp.inf, 0.0, 1.0)
        self.out[...] = jnp.zeros(self.out.shape, jnp.float32)

    def fold(
        self,
        q: Float[Array, "... M D"],
        k: Float[Array, "... T D"],
        v: Float[Array, "... T D"],
        visible: Bool[Array, "... M T"],
        softcap: float | None,
        broken: Float32[Array, "... 1 T"] | None = None,
    ) -> None:
        """Adds a tile (Milakov and Gimelshein, 2018; Dao et al., 2022); a row that sees none of it keeps its bits.

        Args:
          q, k: queries and keys.
          v: values; finite where a row does not see them, as a weight of 0 does not keep out a NaN.
          visible: whether a row sees a position.
          softcap: as in `reference.paged_attention`.
          broken: NaN for positions whose values were taken out for not being finite, else 0; None: none were.
        """
        batch, last = tuple(range(q.ndim - 2)), q.ndim - 1
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
        scores = lax.dot_general(
            q, k, (((last,), (last,)), (batch, batch)), precision=precision, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if broken is not None:
            scores = scores + broken
        scores = jnp.where(visible, scores, -jnp.inf)
        largest = self.largest[...]
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        base = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights, correction = jnp.exp(scores - base), jnp.exp(largest - base)
        self.largest[...] = new_largest
        self.total[...] = self.total[...] * correction + jnp.sum(weights, axis=-1, keepdims=True)
        weighted = lax.dot_general(
            weights.astype(v.dtype),
            v,
            (((last,), (last - 1,)), (batch, batch)),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        self.out[...] = self.out[...] * correction + weighted

    def finish(self) -> None:
        total = self.total[...]
        self.out[...] = jnp.where(total == 0, 0.0, self.out[...] / total)
