"""Which sequence is served first and which one is preempted, on states set up by hand."""

import jax.numpy as jnp
import pytest

from jaxserve.core.scheduler import EngineState, Status, init_state
from jaxserve.core.scheduler.policy import may_admit, next_waiting, service_order, victim
from tests.core.scheduler import traces

LOWEST, HIGHEST = -(2**31), 2**31 - 1
CONFIG = traces.TinyConfig(max_slots=3, num_pages=6, page_size=2, max_model_len=12, chunk_size=3, max_queue=5)


def state_of(
    *rows: tuple[Status, int, int], slots: tuple[int, ...] = (), num_free: int = CONFIG.num_pages
) -> EngineState:
    """Rows (status, priority, arrival), and which row each slot names."""
    padded = [*rows, *[(Status.FREE, 0, 0)] * (CONFIG.queue_size - len(rows))]
    status, priority, arrival = (jnp.array(column, jnp.int32) for column in zip(*padded, strict=True))
    row_id = [*slots, *[CONFIG.queue_size] * (CONFIG.max_slots - len(slots))]
    state = init_state(traces.MODEL, CONFIG)
    return state.replace(
        queue=state.queue.replace(status=status, priority=priority, arrival=arrival),
        slots=state.slots.replace(row_id=jnp.array(row_id, jnp.int32)),
        table=state.table.replace(num_free=jnp.int32(num_free)),
    )


W, R = Status.WAITING, Status.RUNNING


@pytest.mark.parametrize(
    "rows, first",
    [
        ([(W, 0, 5), (W, 0, 3), (W, 0, 4)], 1),
        ([(W, 0, 3), (W, -1, 9), (W, -1, 7)], 2),
        ([(R, -5, 0), (W, 0, 3), (Status.STOP, -5, 1), (Status.FREE, -5, 2)], 1),
        ([(Status.FREE, LOWEST, 0), (W, HIGHEST, 8), (W, HIGHEST, 6)], 2),
        ([(W, LOWEST, 8), (W, 0, 2)], 0),
    ],
)
def test_the_lowest_priority_then_the_earliest_arrival_is_next(rows, first):
    row, found = next_waiting(state_of(*rows))
    assert (int(row), bool(found)) == (first, True)


def test_no_row_is_next_when_none_waits():
    assert not bool(next_waiting(state_of((R, 0, 0), (Status.STOP, 0, 1)))[1])


@pytest.mark.parametrize(
    "num_needed, num_decoding, num_free, slots, expected",
    [
        (3, 2, 5, (0, 1), True),
        (3, 2, 4, (0, 1), False),
        (3, 0, 3, (0,), True),
        (4, 0, 3, (0,), False),
        (6, 0, 6, (), True),
    ],
)
def test_admission_leaves_one_page_per_decoding_slot(num_needed, num_decoding, num_free, slots, expected):
    state = state_of((R, 0, 0), (R, 0, 1), slots=slots, num_free=num_free)
    assert bool(may_admit(state, jnp.int32(num_needed), jnp.int32(num_decoding))) == expected


@pytest.mark.parametrize(
    "rows, slots, slot",
    [
        ([(R, 0, 5), (R, 0, 7), (R, 0, 6)], (2, 1, 0), 1),
        ([(R, 1, 2), (R, 0, 9), (R, 1, 3)], (0, 1, 2), 2),
        ([(R, 0, 0)], (0,), 0),
        ([(R, LOWEST, 4), (R, LOWEST, 3)], (1, 0), 1),
        # Waiting rows are not asked, whatever their priority; nor is the row that an empty slot would clip to.
        ([(R, 0, 1), (W, 5, 2), (R, 0, 0), (W, 9, 3), (W, 9, 4)], (0, 2), 0),
    ],
)
def test_the_victim_has_the_highest_priority_then_the_latest_arrival_of_the_slots_in_use(rows, slots, slot):
    assert int(victim(state_of(*rows, slots=slots))) == slot


def test_decoding_slots_are_served_first_then_prefilling_ones_by_priority_and_arrival():
    state = state_of((R, 0, 4), (R, 0, 2), (R, -1, 9), slots=(0, 1, 2))
    assert service_order(state, jnp.array([False, False, False])).tolist() == [2, 1, 0]
    assert service_order(state, jnp.array([True, False, False])).tolist() == [0, 2, 1]
    assert service_order(state, jnp.array([True, False, True]))[2] == 1


def test_unused_slots_are_served_last():
    state = state_of((R, 0, 4), slots=(CONFIG.queue_size, 0))
    assert service_order(state, jnp.zeros(3, bool))[0] == 1
