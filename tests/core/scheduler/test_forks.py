"""How a sequence starts beside others of its group, on states set up by hand; and the invariants of shared pages."""

import jax.numpy as jnp
import pytest

from jaxserve.core.scheduler import EngineState, InvariantError, Status, check_invariants, init_state
from jaxserve.core.scheduler.forks import start_of
from tests.core.scheduler import traces

CONFIG = traces.TinyConfig(max_slots=4, num_pages=20, page_size=4, max_model_len=20, chunk_size=4, max_queue=6)
NOTHING = CONFIG.num_pages
HEAD = 5  # the row that asks
W, R = Status.WAITING, Status.RUNNING


def state_of(
    computed: list[int | None], *, prompt_length: int = 11, groups: tuple[int, ...] = (0,) * 6, max_length: int = 20
) -> EngineState:
    """Slot i holds row i with so many tokens computed, None: nothing, on pages from 5 i on. The last row waits."""
    state = init_state(traces.MODEL, CONFIG)
    rows = range(CONFIG.queue_size)
    used = [number is not None for number in computed]
    num_tokens = [max(prompt_length, (number or 0) + 1) for number in [*computed, 0, 0]]
    page_ids = [
        [*range(5 * i, 5 * i + -(-num_tokens[i] // 4)), *[NOTHING] * 5][:5] if used[i] else [NOTHING] * 5
        for i in range(4)
    ]
    held = sorted(page for ids in page_ids for page in ids if page < NOTHING)
    free = [page for page in range(NOTHING) if page not in held]
    return state.replace(
        queue=state.queue.replace(
            prompt_length=jnp.full(len(rows), prompt_length, jnp.int32),
            num_tokens=jnp.array(num_tokens, jnp.int32),
            max_length=jnp.full(len(rows), max_length, jnp.int32),
            group=jnp.array(groups, jnp.int32),
            arrival=jnp.arange(len(rows), dtype=jnp.int32),
            status=jnp.array([R if i < 4 and used[i] else W for i in rows], jnp.int32),
        ),
        slots=state.slots.replace(
            row_id=jnp.array([i if used[i] else len(rows) for i in range(4)], jnp.int32),
            num_computed=jnp.array([number or 0 for number in computed], jnp.int32),
        ),
        table=state.table.replace(
            page_ids=jnp.array(page_ids, jnp.int32),
            free=jnp.array([*free, *held], jnp.int32),
            num_free=jnp.int32(len(free)),
            reference_count=jnp.array([int(page in held) for page in range(NOTHING)], jnp.int32),
        ),
    )


def start(state: EngineState, pending: tuple[int, ...] = (NOTHING,) * 4) -> dict[str, int]:
    """Returns how the last row would start: the fields of `Start`."""
    found = start_of(state, jnp.int32(HEAD), jnp.array(pending, jnp.int32), page_size=CONFIG.page_size)
    names = ("num_computed", "num_shared", "copied_page", "waits") + ("lender",) * bool(found.num_computed > 0)
    return {name: int(getattr(found, name)) for name in names}


FROM_NOTHING = {"num_computed": 0, "num_shared": 0, "copied_page": NOTHING, "waits": 0}


@pytest.mark.parametrize(
    "prompt_length, num_shared, is_copied",
    [
        (2, 0, True),
        (4, 0, True),
        (5, 1, False),
        (6, 1, True),
        (8, 1, True),
        (9, 2, False),
        (11, 2, True),
        (12, 2, True),
    ],
)
def test_pages_wholly_before_the_last_prompt_token_are_shared_and_what_is_left_before_it_is_copied(
    prompt_length, num_shared, is_copied
):
    found = start(state_of([None, 11, None, None], prompt_length=prompt_length))
    copied_page = 5 + num_shared if is_copied else NOTHING
    assert found == {
        "num_computed": prompt_length - 1,
        "num_shared": num_shared,
        "copied_page": copied_page,
        "waits": 0,
        "lender": 1,
    }


def test_a_prompt_of_one_token_has_nothing_to_share():
    assert start(state_of([4, None, None, None], prompt_length=1)) == FROM_NOTHING


@pytest.mark.parametrize("computed", [10, 11, 15])
def test_a_lender_may_lack_the_last_prompt_token_or_be_far_beyond_it(computed):
    assert start(state_of([computed, None, None, None])) == {
        "num_computed": 10,
        "num_shared": 2,
        "copied_page": 2,
        "waits": 0,
        "lender": 0,
    }


@pytest.mark.parametrize("computed", [0, 3, 9])
def test_the_head_waits_while_its_prompt_is_computed(computed):
    assert start(state_of([computed, None, None, None])) == FROM_NOTHING | {"waits": 1}


def test_the_head_does_not_wait_for_one_if_another_has_the_prompt():
    assert start(state_of([4, None, 12, None]))["lender"] == 2


def test_the_head_does_not_wait_for_those_that_end_with_their_first_token():
    assert start(state_of([4, None, None, None], max_length=12)) == FROM_NOTHING
    assert start(state_of([4, None, None, None], max_length=13))["waits"]


def test_other_requests_and_slots_that_are_not_in_use_lend_nothing():
    assert start(state_of([12, 3, None, None], groups=(7, 8, 9, 9, 9, 9))) == FROM_NOTHING
    left = state_of([12, None, None, None])
    left = left.replace(slots=left.slots.replace(row_id=jnp.full(4, CONFIG.queue_size, jnp.int32)))
    assert start(left) == FROM_NOTHING


def test_a_slot_whose_page_is_still_to_be_copied_is_no_lender():
    assert start(state_of([12, 12, None, None]), pending=(5, NOTHING, NOTHING, NOTHING))["lender"] == 1


@pytest.mark.parametrize("computed", [4, 12])
def test_one_that_reports_on_its_prompt_neither_borrows_nor_waits(computed):
    state = state_of([computed, None, None, None])
    asked = state.queue.num_prompt_logprobs.at[HEAD].set(0)
    assert start(state.replace(queue=state.queue.replace(num_prompt_logprobs=asked))) == FROM_NOTHING


def shared(place: int, page: int, computed: int = 12, **options) -> EngineState:
    """Two sequences, the second of which refers to a page of the first at `place` instead of its own."""
    state = state_of([12, computed, None, None], **options)
    own = int(state.table.page_ids[1, place])
    table = state.table
    return state.replace(
        table=table.replace(
            page_ids=table.page_ids.at[1, place].set(page),
            reference_count=table.reference_count.at[page].add(1).at[own].set(0),
            free=table.free.at[table.num_free].set(own),
            num_free=table.num_free + 1,
        )
    )


def test_full_pages_of_the_prompt_may_be_shared():
    for place in (0, 1):
        check_invariants(shared(place, place))


@pytest.mark.parametrize(
    "state, message",
    [
        pytest.param(shared(2, 2), "holds what its owners write", id="the page of the prompt's last token"),
        pytest.param(shared(1, 1, prompt_length=8), "holds what its owners write", id="a page that ends with it"),
        pytest.param(shared(1, 0), "shared by different positions", id="another place"),
        pytest.param(shared(0, 0, groups=(0, 1, 2, 3, 4, 5)), "shared by different requests", id="another request"),
        pytest.param(shared(1, 1, computed=7), "not computed", id="a page that is not full"),
    ],
)
def test_what_must_not_be_shared_is_noticed(state, message):
    with pytest.raises(InvariantError, match=message):
        check_invariants(state)
