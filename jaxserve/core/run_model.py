"""The model on a batch of tokens whose keys and values lie in pages, and the loop that takes a long batch tile by tile."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import KVPool, PageTable
from jaxserve.core.cache.attention import BatchLayout, paged_attend
from jaxserve.core.pytree import Record, record
from jaxserve.models import ModelConfig
from jaxserve.models.bind import BoundModel

T = TypeVar("T")


@record
class TokenBatch(Record):
    """Tokens to run the model on, one per batch row."""

    slot: Int32[Array, " B"]  # whose page-table entries hold the token's sequence; S = none, the batch row is padding
    position: Int32[Array, " B"]  # position of the token in its sequence
    token: Int32[Array, " B"]
    is_last: Bool[Array, " B"]  # whether the slot keeps the final hidden state of this token


def run_model(
    bound: BoundModel,
    batch: TokenBatch,
    cache: tuple[PageTable, KVPool],
    hidden: Float32[Array, "S E"],
    layout: BatchLayout,
    *,
    model: ModelConfig,
    config: EngineConfig,
    batch_size: Int32[Array, ""] | None = None,
) -> tuple[Float32[Array, "B E"], KVPool, Float32[Array, "S E"]]:
    """Runs the model, which writes the tokens' keys and values into the pool and then attends over pages.

    Args:
      bound: from `jaxserve.models.bind`.
      batch: the tokens.
      cache: the page table and the pool.
      hidden: the hidden state that each slot keeps.
      layout: the arrangement of the batch rows.
      model, config: static.
      batch_size: as in `paged_attend`.

    Returns:
      The final hidden state of each token, the new pool, and `hidden` with the states of the last tokens of their slots.
    """
    table, pool = cache
    attend = paged_attend(
        table.page_ids,
        batch.slot,
        batch.position,
        layout,
        group_size=model.group_size,
        backend=config.backend,
        interpret=config.interpret_kernels,
        batch_size=batch_size,
    )
    out, pages = bound(batch.token, batch.position, attend=attend, kv=tuple(zip(pool.k, pool.v, strict=True)))
    k, v = zip(*pages, strict=True)
    slot = jnp.where(batch.is_last, batch.slot, hidden.shape[0])
    return out, KVPool(k=k, v=v), hidden.at[slot].set(out, mode="drop")


def in_tiles(
    body: Callable[[int, Int32[Array, ""], T], T],
    carry: T,
    start: Int32[Array, ""],
    end: Int32[Array, ""],
    sizes: tuple[int, ...],
) -> T:
    """Calls `body(size, first, carry)` for one tile after another until [start, end) is covered.

    Args:
      body: returns the new carry for the `size` entries from `first` on; of the last tile, those from `end` on are padding.
      carry: any tree of arrays.
      start, end: traced numbers of entries; the trip count follows them.
      sizes: static sizes of a tile, the widest first. A wide tile is used only where it is filled.
    """

    def trip(size: int, loop: tuple[Int32[Array, ""], T]) -> tuple[Int32[Array, ""], T]:
        first, carry = loop
        return first + size, body(size, first, carry)

    loop = (start, carry)
    for size in sizes:
        num_ignored = 0 if size == sizes[-1] else size - 1  # entries that narrower tiles take
        go_on = lambda loop, num_ignored=num_ignored: end - loop[0] > num_ignored  # noqa: E731
        loop = lax.while_loop(go_on, functools.partial(trip, size), loop)
    return loop[1]
