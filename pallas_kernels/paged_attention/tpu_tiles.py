"""The parts that both attention kernels for TPUs share: a schedule, tiles of positions read from pages, the running softmax.

The grid of a kernel is a list of items. An item is the work of one batch row or query block over a span of positions of one
slot. The kernel goes through the span in tiles that start at absolute multiples of a fixed number of positions. While it
computes on one buffer, asynchronous copies (one per page and array) fill the other one, also across items:

item 0: tiles 0 1 2      buffers 0 1 0
item 1: tile  5                  1        its copies start while tile 2 of item 0 is computed on
item 2: (no slot)
item 3: tiles 0 1                0 1

Only pages that hold a position of the span are read, so no page of id "none" is. The rest of a buffer holds old numbers.
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

from pallas_kernels.paged_attention.limits import check_shapes
from pallas_kernels.pages import PagedKV

NUM_BUFFERS = 2
LANES = 128
_PAGE_DTYPES = ("float32", "bfloat16", "uint16", "int8", "float8_e4m3fn", "float8_e5m2")
_SCALAR_MEMORY_BYTES = 2**20
_SCALAR_MEMORY_RESERVE = 2**14  # for the compiler


class Schedule(NamedTuple):
    """The slot and span of each item of a kernel, in scalar memory."""

    slot: Int32[Array, " I"]  # S: none
    oldest: Int32[Array, " I"]  # first position of the span
    newest: Int32[Array, " I"]  # last position of the span
    tiles_before: Int32[Array, " I"]  # sum over all items before; its parity is the buffer in which the item starts
    next_item: Int32[Array, " I"]  # the next item with a slot; I: none


def make_schedule(
    slot: Int32[Array, " I"],
    oldest: Int32[Array, " I"],
    newest: Int32[Array, " I"],
    *,
    num_slots: int,
    tile_size: int,
) -> Schedule:
    """Makes the schedule of items with these slots and spans, of which the last position is included."""
    (num_items,) = slot.shape
    works = slot < num_slots
    num_tiles = lax.div(newest, jnp.int32(tile_size)) - lax.div(oldest, jnp.int32(tile_size)) + 1
    num_tiles = jnp.where(works, num_tiles, 0)
    candidates = jnp.where(works, jnp.arange(num_items, dtype=jnp.int32), num_items)
    next_item = lax.cummin(jnp.append(candidates[1:], jnp.int32(num_items)), reverse=True)
    return Schedule(slot, oldest, newest, jnp.cumsum(num_tiles) - num_tiles, next_item)


def check_supported(q: Float[Array, "B H D"], kv: PagedKV, num_scalars: int) -> None:
    """Refuses shapes and dtypes that the kernels for TPUs do not support.

    Args:
      q, kv: arguments of the attention.
      num_scalars: numbers that a kernel keeps in scalar memory beside the page table.

    Raises:
      ValueError: naming the value, the rule and the remedy.
    """
    check_shapes(q, kv)
    if kv.k.dtype.name not in _PAGE_DTYPES:
        raise ValueError(
            f"pages of {kv.k.dtype.name} are not supported on TPUs: use one of {', '.join(_PAGE_DTYPES)}, "
            "or backend 'reference'"
        )
    num_bytes, available = 4 * (kv.page_ids.size + num_scalars), _SCALAR_MEMORY_BYTES - _SCALAR_MEMORY_RESERVE
    if num_bytes > available:
        raise ValueError(
            f"a page table of {list(kv.page_ids.shape)} and {num_scalars} numbers about rows take {num_bytes} bytes of scalar "
            f"memory, above the {available} of a TPU: use larger pages, fewer slots, shorter sequences or fewer rows"
        )


def compute_dtype(kv: PagedKV) -> jnp.dtype:
    """Returns the dtype of operands of products: float32 for float32 pages, else bfloat16, which holds 8-bit numbers too."""
    return jnp.dtype(jnp.float32 if kv.k.dtype == jnp.float32 else jnp.bfloat16)


def padded_head_dim(head_dim: int) -> int:
    """Returns the lanes that a head takes in VMEM."""
    return -(-head_dim // LANES) * LANES


def in_hbm(pages: Shaped[Array, "N K T D"]) -> Shaped[Array, "N K T D"]:
    """Keeps XLA from copying a small pool to VMEM as a whole. Outside of jit there is no way to do so."""
    if not isinstance(pages, jax.core.Tracer):
        return pages
    return pltpu.with_memory_space_constraint(pages, pltpu.HBM)


def interpreted(interpret: bool) -> bool | pltpu.InterpretParams:
    """Returns the interpreter that models copies and semaphores, in which memory that was never written is NaN; or False."""
    return pltpu.InterpretParams() if interpret else False


def grouped_queries(q: Float[Array, "B H D"], kv: PagedKV) -> Float32[Array, "B K G D"]:
    """Returns queries grouped by kv head, times the scale of the head's keys."""
    q = q.astype(jnp.float32).reshape(q.shape[0], kv.k.shape[1], -1, q.shape[2])
    return q if kv.k_scale is None else q * kv.k_scale[None, :, None, None]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A reader of the tiles of a schedule's items. All fields but `pages_per_slot` are references inside a kernel.

    Attributes:
      schedule: slot and span of each item.
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
        """Calls `fold(k_tile, v_tile, first_position)` for the tiles of an item in order, once each is in VMEM.

        Args:
          item: an item with a slot. The kernel must call this for its items in ascending order, once for each.
          first_head: a function of the item that returns the first of the kv heads that it works on.
          fold: takes references to [heads, tile size, D]. Positions outside of the item's span hold arbitrary numbers.
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
        """Calls `act` with one copy per page and array, of all heads at once: the heads of a page are adjacent in HBM."""
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
    """Returns stored numbers as an operand of a product."""
    if stored.dtype == jnp.uint16:
        stored = pltpu.bitcast(stored, jnp.bfloat16)
    return stored.astype(dtype)


def as_stored(values: Float32[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """Returns float32 numbers as they are stored: the reverse of `as_operand`."""
    if dtype == jnp.uint16:
        return pltpu.bitcast(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


class SoftmaxState(NamedTuple):
    """References to the running softmax of M queries."""

    largest: jax.Ref  # [..., M, 1]
    total: jax.Ref  # [..., M, 1], sum of weights relative to `largest`
    out: jax.Ref  # [..., M, D], sum of weighted values

    def start(self, sinks: Float32[Array, "... M 1"]) -> None:
        """Starts with sinks (-inf: no sink). A sink is a score that has no value."""
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
        """Adds a tile (Milakov and Gimelshein, 2018; Dao et al., 2022). A query that sees none of it keeps its bits.

        Args:
          q, k: queries and keys.
          v: values. They must be finite where a query does not see them, since 0 times NaN is NaN.
          visible: whether a query sees a position.
          softcap: as in `reference.paged_attention`.
          broken: NaN at positions whose values were replaced because they were not finite, else 0; None: no such position.
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
        """Divides by the sum of weights; queries that saw nothing get 0."""
        total = self.total[...]
        self.out[...] = jnp.where(total == 0, 0.0, self.out[...] / total)
