"""The page table: build one, make one move, look at every field."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.cache.page_table import (
    PageTable,
    allocate,
    allocate_each,
    init_page_table,
    release,
    release_each,
    share,
)

NONE = 6  # of a table of 6 pages


def table_of(page_ids: list[list[int]], free: list[int]) -> PageTable:
    """Returns a table with slots of three pages each, and a stack of free pages with stale entries above its top."""
    stale = [page for row in page_ids for page in row if page != NONE]
    held = np.bincount(np.array(page_ids).ravel(), minlength=NONE + 1)[:NONE]
    return PageTable(
        page_ids=jnp.array(page_ids, jnp.int32),
        free=jnp.array((free + stale + [0] * NONE)[:NONE], jnp.int32),
        num_free=jnp.int32(len(free)),
        reference_count=jnp.array(held, jnp.int32),
    )


def check(table: PageTable, page_ids: list[list[int]], free: list[int], reference_count: list[int]) -> None:
    assert table.page_ids.tolist() == page_ids
    assert table.free[: table.num_free].tolist() == free
    assert table.reference_count.tolist() == reference_count
    assert {leaf.dtype for leaf in (table.page_ids, table.free, table.num_free, table.reference_count)} == {
        jnp.dtype("int32")
    }
    assert (table.num_pages, table.pages_per_slot) == (NONE, 3)


def check_same(table: PageTable, other: PageTable) -> None:
    check(table, other.page_ids.tolist(), other.free[: other.num_free].tolist(), other.reference_count.tolist())


def start() -> PageTable:
    """Slot 0 holds pages 4 and 0, slot 1 none, slot 2 page 5."""
    return table_of([[4, 0, NONE], [NONE] * 3, [5, NONE, NONE]], free=[3, 1, 2])


def mask(*values: int) -> jnp.ndarray:
    return jnp.array(values, bool)


def test_in_a_new_table_every_page_is_free_and_no_slot_holds_any():
    check(init_page_table(2, 3, NONE), [[NONE] * 3] * 2, free=[5, 4, 3, 2, 1, 0], reference_count=[0] * 6)


def test_allocate_takes_the_pages_from_the_top_of_the_stack():
    table, granted = allocate(start(), jnp.int32(1), jnp.int32(2))
    assert bool(granted)
    check(table, [[4, 0, NONE], [2, 1, NONE], [5, NONE, NONE]], free=[3], reference_count=[1, 1, 1, 0, 1, 1])


def test_allocate_can_take_all_pages_that_are_free():
    table, granted = allocate(start(), jnp.int32(1), jnp.int32(3))
    assert bool(granted)
    check(table, [[4, 0, NONE], [2, 1, 3], [5, NONE, NONE]], free=[], reference_count=[1] * 6)


def test_allocate_leaves_the_table_alone_when_too_few_pages_are_free():
    before = table_of([[4, 0, 2], [NONE] * 3, [5, NONE, NONE]], free=[3, 1])
    table, granted = allocate(before, jnp.int32(1), jnp.int32(3))
    assert not bool(granted)
    check_same(table, before)


def test_allocate_of_no_pages_is_granted_and_changes_nothing():
    before = table_of([[4, 0, 2], [NONE] * 3, [5, 3, 1]], free=[])
    table, granted = allocate(before, jnp.int32(1), jnp.int32(0))
    assert bool(granted)
    check_same(table, before)


def test_allocate_gives_further_pages_behind_those_that_a_slot_has():
    table, granted = allocate(start(), jnp.int32(2), jnp.int32(2))
    assert bool(granted)
    check(table, [[4, 0, NONE], [NONE] * 3, [5, 2, 1]], free=[3], reference_count=[1, 1, 1, 0, 1, 1])


def test_allocate_each_gives_one_page_to_every_slot_that_wants_one():
    table, granted = allocate_each(start(), mask(1, 0, 1), jnp.array([2, 0, 1], jnp.int32))
    assert granted.tolist() == [True, False, True]
    check(table, [[4, 0, 2], [NONE] * 3, [5, 1, NONE]], free=[3], reference_count=[1, 1, 1, 0, 1, 1])


def test_allocate_each_goes_by_slot_while_pages_last():
    before = table_of([[4, 0, NONE], [2, 1, NONE], [5, NONE, NONE]], free=[3])
    table, granted = allocate_each(before, mask(0, 1, 1), jnp.array([2, 2, 1], jnp.int32))
    assert granted.tolist() == [False, True, False]
    check(table, [[4, 0, NONE], [2, 1, 3], [5, NONE, NONE]], free=[], reference_count=[1] * 6)


@pytest.mark.parametrize("free, wants", [([3, 1, 2], (0, 0, 0)), ([], (1, 0, 1))])
def test_allocate_each_changes_nothing_when_no_slot_wants_a_page_or_none_is_free(free, wants):
    before = start() if free else table_of([[4, 0, NONE], [3, 1, 2], [5, NONE, NONE]], free=[])
    table, granted = allocate_each(before, mask(*wants), jnp.array([2, 0, 1], jnp.int32))
    assert granted.tolist() == [False] * 3
    check_same(table, before)


def test_release_puts_the_pages_of_one_slot_on_the_stack():
    table = release(start(), jnp.int32(0))
    check(table, [[NONE] * 3, [NONE] * 3, [5, NONE, NONE]], free=[3, 1, 2, 4, 0], reference_count=[0, 0, 0, 0, 0, 1])


def test_release_of_a_slot_without_pages_changes_nothing():
    check_same(release(start(), jnp.int32(1)), start())


def test_release_each_frees_the_pages_of_the_slots_of_the_mask_only():
    before = table_of([[4, 0, NONE], [2, NONE, NONE], [5, NONE, NONE]], free=[3, 1])
    table = release_each(before, mask(1, 0, 1))
    check(table, [[NONE] * 3, [2, NONE, NONE], [NONE] * 3], free=[3, 1, 4, 0, 5], reference_count=[0, 0, 1, 0, 0, 0])


def test_release_each_of_an_empty_mask_changes_nothing():
    check_same(release_each(start(), mask(0, 0, 0)), start())


def test_share_lets_a_child_refer_to_the_first_pages_of_its_parent():
    table = share(start(), jnp.int32(0), jnp.int32(1), jnp.int32(1))
    check(table, [[4, 0, NONE], [4, NONE, NONE], [5, NONE, NONE]], free=[3, 1, 2], reference_count=[1, 0, 0, 0, 2, 1])


def test_share_of_no_pages_changes_nothing():
    check_same(share(start(), jnp.int32(0), jnp.int32(1), jnp.int32(0)), start())


def test_a_child_gets_its_own_pages_behind_the_shared_ones():
    table = share(start(), jnp.int32(0), jnp.int32(1), jnp.int32(1))
    table, granted = allocate(table, jnp.int32(1), jnp.int32(2))
    assert bool(granted)
    check(table, [[4, 0, NONE], [4, 2, 1], [5, NONE, NONE]], free=[3], reference_count=[1, 1, 1, 0, 2, 1])
    table, granted = allocate_each(share(start(), *map(jnp.int32, (0, 1, 1))), mask(0, 1, 0), jnp.array([0, 1, 0]))
    assert granted.tolist() == [False, True, False]
    check(table, [[4, 0, NONE], [4, 2, NONE], [5, NONE, NONE]], free=[3, 1], reference_count=[1, 0, 1, 0, 2, 1])


@pytest.mark.parametrize("first, free", [(0, [3, 1, 2, 0]), (1, [3, 1, 2])])
def test_a_shared_page_stays_with_the_owner_that_is_left(first, free):
    table = release(share(start(), jnp.int32(0), jnp.int32(1), jnp.int32(1)), jnp.int32(first))
    rows = [[4, 0, NONE], [4, NONE, NONE], [5, NONE, NONE]]
    rows[first] = [NONE] * 3
    check(table, rows, free=free, reference_count=[first, 0, 0, 0, 1, 1])


def test_a_shared_page_is_freed_once_when_all_its_owners_leave_in_one_call():
    shared = share(start(), jnp.int32(0), jnp.int32(1), jnp.int32(2))
    table = release_each(shared, mask(1, 1, 0))
    check(table, [[NONE] * 3, [NONE] * 3, [5, NONE, NONE]], free=[3, 1, 2, 4, 0], reference_count=[0, 0, 0, 0, 0, 1])


def test_of_three_owners_the_last_one_frees_the_page():
    shared = share(
        table_of([[4, 0, NONE], [NONE] * 3, [NONE] * 3], free=[3, 1, 2, 5]), jnp.int32(0), jnp.int32(1), jnp.int32(2)
    )
    shared = share(shared, jnp.int32(1), jnp.int32(2), jnp.int32(1))
    check(shared, [[4, 0, NONE], [4, 0, NONE], [4, NONE, NONE]], free=[3, 1, 2, 5], reference_count=[2, 0, 0, 0, 3, 0])
    table = release_each(shared, mask(1, 1, 0))
    check(table, [[NONE] * 3, [NONE] * 3, [4, NONE, NONE]], free=[3, 1, 2, 5, 0], reference_count=[0, 0, 0, 0, 1, 0])
    check(release(table, jnp.int32(2)), [[NONE] * 3] * 3, free=[3, 1, 2, 5, 0, 4], reference_count=[0] * 6)


class Pages:
    """A page table of lists and a set, with which a random walk is compared."""

    def __init__(self, max_slots: int, num_pages: int):
        self.slots: list[list[int]] = [[] for _ in range(max_slots)]
        self.num_pages = num_pages

    def free(self) -> set[int]:
        return set(range(self.num_pages)) - {page for pages in self.slots for page in pages}

    def agrees_with(self, table: PageTable) -> bool:
        page_ids, free, num_free, count = map(
            np.asarray, (table.page_ids, table.free, table.num_free, table.reference_count)
        )
        held = [[page for page in row if page < self.num_pages] for row in page_ids.tolist()]
        used = [page for pages in self.slots for page in pages]
        return (
            held == self.slots
            and all(row[: len(pages)] == pages for row, pages in zip(page_ids.tolist(), held, strict=True))
            and sorted(free[:num_free].tolist()) == sorted(self.free())
            and count.tolist() == [used.count(page) for page in range(self.num_pages)]
        )


@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_of_moves_agrees_with_sets(seed):
    rng, max_slots, pages_per_slot, num_pages = random.Random(seed), 4, 3, 7
    table, pages = init_page_table(max_slots, pages_per_slot, num_pages), Pages(max_slots, num_pages)
    made = dict.fromkeys(("allocate", "refused", "grow", "share", "leave", "leave together"), 0)
    for _ in range(120):
        empty = [slot for slot, held in enumerate(pages.slots) if not held]
        used = [slot for slot, held in enumerate(pages.slots) if held]
        move = rng.choice(("allocate", "grow", "share", "leave"))
        if move == "allocate" and empty:
            slot, num_new = rng.choice(empty), rng.randint(1, pages_per_slot)
            table, granted = ALLOCATE(table, jnp.int32(slot), jnp.int32(num_new))
            assert bool(granted) == (num_new <= len(pages.free()))
            made["allocate" if granted else "refused"] += 1
            if granted:
                new = table.page_ids[slot, :num_new].tolist()
                assert set(new) <= pages.free()
                pages.slots[slot] = new
        elif move == "grow":
            wants = [0 < len(held) < pages_per_slot and rng.random() < 0.5 for held in pages.slots]
            index = [len(held) for held in pages.slots]
            table, granted = ALLOCATE_EACH(table, mask(*wants), jnp.array(index, jnp.int32))
            assert sum(granted.tolist()) == min(sum(wants), len(pages.free()))
            made["grow"] += any(granted.tolist())
            for slot, got in enumerate(granted.tolist()):
                if got:
                    page = int(table.page_ids[slot, index[slot]])
                    assert page in pages.free()
                    pages.slots[slot].append(page)
        elif move == "share" and empty and used:
            parent, child = rng.choice(used), rng.choice(empty)
            num_shared = rng.randint(1, len(pages.slots[parent]))
            table = SHARE(table, jnp.int32(parent), jnp.int32(child), jnp.int32(num_shared))
            pages.slots[child] = pages.slots[parent][:num_shared]
            made["share"] += 1
        elif move == "leave":
            leaving = [rng.random() < 0.4 for _ in pages.slots]
            together = [page for slot in range(max_slots) if leaving[slot] for page in pages.slots[slot]]
            made["leave"] += bool(together)
            made["leave together"] += len(together) > len(set(together))
            table = RELEASE_EACH(table, mask(*leaving))
            for slot in range(max_slots):
                pages.slots[slot] = [] if leaving[slot] else pages.slots[slot]
        assert pages.agrees_with(table)
    assert all(made.values()), made


ALLOCATE, ALLOCATE_EACH, SHARE, RELEASE_EACH = map(jax.jit, (allocate, allocate_each, share, release_each))
