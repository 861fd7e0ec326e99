"""The pages of beams: after each choice every beam takes over the pages of its parent.

Full pages are shared. Of the beams that share a parent, all but the first copy the page that is not full.

    parent = [0 0 2 0], page 7 of beam 0 and 9 of beam 2 are partly filled:

    before  beam 0: 1 2 7    beam 1: 1 2 8    beam 2: 1 5 9    beam 3: 1 6 4
    after   beam 0: 1 2 7    beam 1: 1 2 8'   beam 2: 1 5 9    beam 3: 1 2 6'     8' and 6' hold copies of 7; 4 is free
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxserve.core.beam_search.state import BeamState
from jaxserve.core.cache import PageTable, copy_pages
from jaxserve.core.cache.page_table import allocate_each


def take_over(table: PageTable, parent: Int32[Array, " S"], num_pages: Int32[Array, " S"]) -> PageTable:
    """Makes every slot refer to the first `num_pages` pages of its parent slot in place of its own, all slots at once.

    Pages that no slot refers to afterwards are free. The work follows the size of the table and of the pool; a beam search
    makes both no larger than its beams may need.

    Args:
      table: the page table.
      parent: the slot whose pages, as they were before, each slot gets; S = none, the slot is empty afterwards.
      num_pages: how many of the parent's pages each slot gets.
    """
    order = jnp.arange(table.pages_per_slot, dtype=jnp.int32)[None, :]
    held = table.page_ids.at[parent].get(mode="fill", fill_value=table.num_pages)
    page_ids = jnp.where(order < num_pages[:, None], held, table.num_pages)
    count = jnp.zeros_like(table.reference_count).at[page_ids].add(1, mode="drop")
    freed = (table.reference_count > 0) & (count == 0)
    place = table.num_free + jnp.cumsum(freed.astype(jnp.int32), dtype=jnp.int32) - 1
    pages = jnp.arange(table.num_pages, dtype=jnp.int32)
    return PageTable(
        page_ids=page_ids,
        free=table.free.at[jnp.where(freed, place, table.num_pages)].set(pages, mode="drop"),
        num_free=table.num_free + jnp.sum(freed, dtype=jnp.int32),
        reference_count=count,
    )


def move_pages(state: BeamState, parent: Int32[Array, "R W"], *, page_size: int) -> BeamState:
    """Gives every beam the pages of its parent, and a page of its own for the position that comes next.

    Args:
      state: after `choose`, its pages still those of the beams before it.
      parent: the beam that each beam continues.
      page_size: T.
    """
    num_requests, width = parent.shape
    num_slots = num_requests * width
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    first = _is_first_child(parent).reshape(num_slots)
    active = jnp.repeat(~state.done, width, total_repeat_length=num_slots)
    parent = jnp.where(
        active, (parent + jnp.arange(num_requests, dtype=jnp.int32)[:, None] * width).reshape(-1), num_slots
    )

    position = jnp.repeat(state.prompt_length, width, total_repeat_length=num_slots) + state.num_generated - 1
    page, partial = position // page_size, position % page_size > 0
    table = take_over(state.table, parent, page + (partial & first).astype(jnp.int32))
    own = active & ~(partial & first)  # the pool has a page for each of these: see `pages_per_request`
    table, granted = allocate_each(table, own, page)
    copies = granted & partial
    source = state.table.page_ids.at[parent, page].get(mode="fill", fill_value=table.num_pages)
    target = jnp.where(copies, table.page_ids.at[slots, page].get(mode="clip"), table.num_pages)
    return state.replace(table=table, pool=copy_pages(state.pool, source, target))


def _is_first_child(parent: Int32[Array, "R W"]) -> Bool[Array, "R W"]:
    """Returns for each beam whether no lower beam continues the same parent."""
    beams = jnp.arange(parent.shape[1], dtype=jnp.int32)
    same = parent[:, None, :] == parent[:, :, None]
    return ~jnp.any(same & (beams[None, :] < beams[:, None])[None], axis=2)
