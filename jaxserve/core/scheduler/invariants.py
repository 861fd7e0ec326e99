"""Checks on the host of the rules that every state obeys between two steps (promises P2 and P3); see `debug_checks`."""

import jax
import numpy as np

from jaxserve.core.cache import PageTable
from jaxserve.core.scheduler.state import EngineState, Queue, Slots, Status


class InvariantError(AssertionError):
    """The state contradicts itself. This is a defect of jaxserve, not of its user."""


def check_invariants(state: EngineState) -> None:
    """Checks the rules of a state. Copies the scheduler's arrays to the host.

    A page is either free or referred to, and reference counts equal references. Free pages are distinct. A slot's pages are
    contiguous from its first and cover its computed tokens. Slots and RUNNING rows name each other one to one. Lengths lie
    within their bounds. A page that several slots refer to holds the same positions of samples of one request; all of these
    are computed, and all lie before the prompt's last token.

    Raises:
      InvariantError: naming the first rule that is broken.
    """
    queue, slots, table = jax.device_get((state.queue, state.slots, state.table))
    num_pages, queue_size = table.free.shape[0], queue.status.shape[0]
    references = np.bincount(table.page_ids.ravel(), minlength=num_pages + 1)[:num_pages]
    free = table.free[: table.num_free]
    _require(0 <= table.num_free <= num_pages, f"num_free={table.num_free} is outside [0, {num_pages}]")
    _require(len(set(free.tolist())) == len(free), "a page is free twice")
    _require(bool(np.all((free >= 0) & (free < num_pages))), "the free stack holds an id out of range")
    _require(not references[free].any(), "a free page is referred to")
    _require(np.array_equal(references, table.reference_count), "reference counts differ from references")
    _require(len(free) + np.count_nonzero(references) == num_pages, "pages are lost: neither free nor referred to")

    active = slots.row_id < queue_size
    rows = slots.row_id[active]
    _require(len(set(rows.tolist())) == len(rows), "two slots name one row")
    running = np.flatnonzero(queue.status == Status.RUNNING)
    _require(np.array_equal(np.sort(rows), running), "slots and running rows do not name each other")
    held = table.page_ids < num_pages
    num_held = held.sum(axis=1)
    _require(np.array_equal(held, np.arange(held.shape[1]) < num_held[:, None]), "a slot's pages have a hole")
    _require(not num_held[~active].any(), "a slot not in use holds pages")
    page_size = state.pool.k[0].shape[2] if state.pool is not None else None
    if page_size is not None:
        needed = -(-slots.num_computed[active] // page_size)
        _require(bool(np.all(num_held[active] >= needed)), "a slot's computed tokens exceed its pages")
        useful = -(-queue.num_tokens[rows] // page_size)
        _require(bool(np.all(num_held[active] <= useful)), "a slot holds more pages than its tokens need")
        _check_shared_pages(queue, slots, table, page_size)
    _require(
        bool(np.all(slots.num_computed[active] < queue.num_tokens[rows])), "a running row has nothing left to compute"
    )

    used = queue.status != Status.FREE
    _require(bool(np.all(queue.num_tokens[used] >= queue.prompt_length[used])), "a row lost tokens of its prompt")
    unfinished = (queue.status == Status.WAITING) | (queue.status == Status.RUNNING)
    _require(bool(np.all(queue.num_tokens[unfinished] < queue.max_length[unfinished])), "a row outlived its max_length")


def _check_shared_pages(queue: Queue, slots: Slots, table: PageTable, page_size: int) -> None:
    slot, place = np.nonzero(np.append(table.reference_count, 0)[table.page_ids] > 1)
    page, row = table.page_ids[slot, place], slots.row_id[slot]
    for name, value in (("positions", place), ("requests", queue.group[row])):
        of_page = np.zeros(table.num_pages, np.int32)
        of_page[page] = value
        _require(np.array_equal(of_page[page], value), f"a page is shared by different {name}")
    end = (place + 1) * page_size
    _require(bool(np.all(end <= slots.num_computed[slot])), "a shared page is not computed")
    _require(bool(np.all(end < queue.prompt_length[row])), "a shared page holds what its owners write")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"{message}: please report this as a defect of jaxserve, with the configuration used")
