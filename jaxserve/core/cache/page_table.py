"""Which page of the pool holds which positions of which slot, and which pages are free.

Free pages lie on a stack; allocation and release move its top. The work is proportional to the pages that one slot can
hold, or to the number of slots when each gets one page: never to the size of the pool. Pages carry reference counts because
forked sequences share their full pages; a page is free when no slot refers to it.

    page_ids = [[4, 0, -],      free = [3, 1, 2 | 0, 4]     "-" is none = N; "|" marks num_free,
                [-, -, -]]      reference_count = [1, 0, 0, 0, 1]   entries above it are stale

The allocator never raises: whether pages were granted is a value.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.core.pytree import Record, record


@record
class PageTable(Record):
    """Page ids per slot, the stack of free pages, and reference counts."""

    page_ids: Int32[Array, "S P"]  # pool page holding the slot's p-th page of positions; N = none
    free: Int32[Array, " N"]  # a stack: free[:num_free] are the free pages, the rest is stale
    num_free: Int32[Array, ""]  # pages
    reference_count: Int32[Array, " N"]  # entries of page_ids that name the page

    @property
    def num_pages(self) -> int:
        """N, which is also the id that means "no page"."""
        return self.free.shape[0]

    @property
    def pages_per_slot(self) -> int:
        """P, pages of the longest sequence."""
        return self.page_ids.shape[1]


def init_page_table(max_slots: int, pages_per_slot: int, num_pages: int) -> PageTable:
    """Returns a table in which every page is free."""
    return PageTable(
        page_ids=jnp.full((max_slots, pages_per_slot), num_pages, jnp.int32),
        free=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(num_pages, jnp.int32),
        reference_count=jnp.zeros((num_pages,), jnp.int32),
    )


def allocate(table: PageTable, slot: Int32[Array, ""], num_new: Int32[Array, ""]) -> tuple[PageTable, Bool[Array, ""]]:
    """Gives a slot `num_new` pages after those that it has: all of them, or none.

    Returns:
      The table, unchanged if too few pages are free, and whether the pages were granted.
    """
    granted = num_new <= table.num_free
    num_new = jnp.where(granted, num_new, 0)
    num_held = jnp.sum(table.page_ids[slot] < table.num_pages, dtype=jnp.int32)
    order = jnp.arange(table.pages_per_slot, dtype=jnp.int32) - num_held
    new = (order >= 0) & (order < num_new)
    pages = _pages_on_top(table, order, new)
    page_ids = table.page_ids.at[slot].set(jnp.where(new, pages, table.page_ids[slot]))
    return _pop(table.replace(page_ids=page_ids), pages, num_new), granted


def allocate_each(
    table: PageTable, wants: Bool[Array, " S"], page_index: Int32[Array, " S"]
) -> tuple[PageTable, Bool[Array, " S"]]:
    """Gives one page to every slot that wants one, in slot order while pages last.

    Args:
      table: the page table.
      wants: the slots that want a page.
      page_index: the place of the new page among the pages of its slot.

    Returns:
      The table, and for each slot whether it was granted a page.
    """
    order = jnp.cumsum(wants.astype(jnp.int32), dtype=jnp.int32) - 1
    granted = wants & (order < table.num_free)
    pages = _pages_on_top(table, order, granted)
    slots = jnp.arange(wants.shape[0], dtype=jnp.int32)
    index = jnp.where(granted, page_index, table.pages_per_slot)
    page_ids = table.page_ids.at[slots, index].set(pages, mode="drop")
    return _pop(table.replace(page_ids=page_ids), pages, jnp.sum(granted, dtype=jnp.int32)), granted


def release(table: PageTable, slot: Int32[Array, ""]) -> PageTable:
    """Takes all pages from a slot. Those that no other slot refers to are free afterwards."""
    held = table.page_ids[slot]
    count = table.reference_count.at[held].add(-1, mode="drop")
    freed = (held < table.num_pages) & (count.at[held].get(mode="clip") == 0)
    order = jnp.cumsum(freed.astype(jnp.int32), dtype=jnp.int32) - 1
    place = jnp.where(freed, table.num_free + order, table.num_pages)
    return table.replace(
        page_ids=table.page_ids.at[slot].set(table.num_pages),
        free=table.free.at[place].set(held, mode="drop"),
        num_free=table.num_free + jnp.sum(freed, dtype=jnp.int32),
        reference_count=count,
    )


def release_each(table: PageTable, releasing: Bool[Array, " S"]) -> PageTable:
    """Takes all pages from every slot in `releasing`, in a loop with one trip per slot."""

    def one(carry: tuple[PageTable, Bool[Array, " S"]]) -> tuple[PageTable, Bool[Array, " S"]]:
        table, pending = carry
        slot = jnp.argmax(pending).astype(jnp.int32)
        return release(table, slot), pending.at[slot].set(False)

    return lax.while_loop(lambda carry: jnp.any(carry[1]), one, (table, releasing))[0]


def share(
    table: PageTable, parent: Int32[Array, ""], child: Int32[Array, ""], num_pages: Int32[Array, ""]
) -> PageTable:
    """Makes an empty slot refer to the first `num_pages` pages of another. Neither slot may write to them afterwards.

    A fork shares the full pages, and copies the page that is not full into one of its own, from `allocate`.
    """
    order = jnp.arange(table.pages_per_slot, dtype=jnp.int32)
    shared = jnp.where(order < num_pages, table.page_ids[parent], table.num_pages)
    return table.replace(
        page_ids=table.page_ids.at[child].set(shared),
        reference_count=table.reference_count.at[shared].add(1, mode="drop"),
    )


def _pages_on_top(table: PageTable, order: Int32[Array, " X"], granted: Bool[Array, " X"]) -> Int32[Array, " X"]:
    """Returns the page that lies `order` places below the top of the stack where `granted`; N elsewhere."""
    page = table.free.at[table.num_free - 1 - order].get(mode="clip")
    return jnp.where(granted, page, table.num_pages)


def _pop(table: PageTable, pages: Int32[Array, " X"], num_pages: Int32[Array, ""]) -> PageTable:
    """Takes the top `num_pages` entries off the stack, and gives the pages their first reference."""
    return table.replace(
        num_free=table.num_free - num_pages, reference_count=table.reference_count.at[pages].set(1, mode="drop")
    )
