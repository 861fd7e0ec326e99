"""The operations of an owner between steps: submit, abort, collect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.sampling import SamplingArrays
from jaxserve.core.scheduler import (
    EngineState,
    Handles,
    Status,
    Submission,
    abort,
    check_invariants,
    collect,
    init_state,
    submit,
)
from tests.core.scheduler import traces
from tests.core.scheduler.oracle import VOCAB_SIZE, Request

CONFIG = traces.TinyConfig(
    max_slots=2, num_pages=8, page_size=2, max_model_len=8, chunk_size=4, max_queue=4, max_logprobs=3
)
NONE = CONFIG.queue_size
SUBMIT = jax.jit(lambda state, submission: submit(state, submission, model=traces.MODEL, config=CONFIG))
STEP = jax.jit(lambda state, marks: traces.stub_step(state, marks, config=CONFIG)[:2])


def start() -> EngineState:
    return init_state(traces.MODEL, CONFIG)


def request(*prompt: int, **changes) -> Request:
    return Request(**{"prompt": prompt, "prompt_length": len(prompt), "max_tokens": 2} | changes)


def put(state: EngineState, *requests: Request | None) -> tuple[EngineState, Handles]:
    wanted = list(requests) + [None] * (3 - len(requests))
    return SUBMIT(state, traces.submission_of(wanted, CONFIG))


def with_status(state: EngineState, *status: Status) -> EngineState:
    """Returns the same rows with other statuses, as if steps had run."""
    return state.replace(queue=state.queue.replace(status=jnp.array([int(value) for value in status], jnp.int32)))


def rows(*wanted: int) -> jnp.ndarray:
    return jnp.array([row in wanted for row in range(NONE)])


def same(state: EngineState, other: EngineState) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True))


def sampling_rows(**changes) -> SamplingArrays:
    """Three rows of valid values, no two alike, with some fields changed."""
    values = {
        "temperature": [0.0, 0.5, 2.0],
        "top_k": [0, 1, 7],
        "top_p": [1.0, 0.5, 0.25],
        "min_p": [0.0, 1.0, 0.5],
        "key_data": [[1, 2], [3, 4], [2**32 - 1, 6]],
        "sample_index": [0, 1, 2],
        "num_logprobs": [-1, 0, 3],
        "processed": [False, True, False],
    }
    kept = jax.device_get(start().queue.sampling)
    known = {field.name: getattr(kept, field.name)[:3] for field in dataclasses.fields(SamplingArrays)}
    changed = {name: np.array(value, known[name].dtype) for name, value in (values | changes).items()}
    return SamplingArrays(**known | changed)


def submission_with(sampling: SamplingArrays) -> Submission:
    submission = traces.submission_of([request(1, 2), request(3), request(4, 5, 6)], CONFIG)
    return submission.replace(sampling=sampling)


def test_submitted_sequences_wait_in_the_first_free_rows():
    wanted = request(1, 2, 3, priority=-4, stop_token_ids=(9,)), request(4, max_tokens=5)
    state, handles = put(start(), *wanted)
    queue = state.queue
    assert handles.row_id.tolist() == [0, 1, NONE]
    assert handles.generation.tolist() == [1, 1, 0]
    assert queue.status.tolist() == [Status.WAITING, Status.WAITING, Status.FREE, Status.FREE]
    assert queue.tokens[0, :3].tolist() == [1, 2, 3] and queue.tokens[1, :1].tolist() == [4]
    assert queue.prompt_length[:2].tolist() == queue.num_tokens[:2].tolist() == [3, 1]
    assert queue.max_length[:2].tolist() == [5, 6]
    assert queue.stop_token_ids[:2].tolist() == [[9, -1], [-1, -1]]
    assert queue.priority[:2].tolist() == [-4, 0]
    assert queue.arrival[:2].tolist() == [0, 1] and int(state.next_arrival) == 2
    assert not queue.abort_requested.any() and not queue.num_preemptions.any()
    check_invariants(state)


def test_padding_takes_no_row_and_no_arrival():
    state, handles = put(start(), None, request(1), None)
    assert handles.row_id.tolist() == [NONE, 0, NONE]
    assert state.queue.status.tolist() == [Status.WAITING, 0, 0, 0]
    assert int(state.next_arrival) == 1


def test_a_submission_of_padding_changes_nothing():
    before, _ = put(start(), request(1))
    assert same(put(before)[0], before)


def test_sequences_beyond_the_free_rows_are_not_taken():
    before, _ = put(start(), request(1), request(2), request(3))
    state, handles = put(before, request(4), request(5), request(6))
    assert handles.row_id.tolist() == [3, NONE, NONE]
    assert handles.generation.tolist() == [1, 0, 0]
    assert state.queue.tokens[:, 0].tolist() == [1, 2, 3, 4]
    assert state.queue.arrival.tolist() == [0, 1, 2, 3] and int(state.next_arrival) == 4
    assert same(put(state, request(7))[0], state)


def test_rows_given_back_are_used_again_under_a_new_generation():
    state, _ = put(start(), request(1), request(2), request(3))
    state = with_status(state, Status.WAITING, Status.STOP, Status.WAITING, Status.FREE)
    state = abort(state, rows(0), state.queue.generation)
    state = state.replace(queue=state.queue.replace(num_preemptions=jnp.full(NONE, 5, jnp.int32)))
    state = collect(state, rows(1), state.queue.generation)
    state, handles = put(state, request(4), request(5))
    assert handles.row_id.tolist() == [1, 3, NONE]
    assert handles.generation.tolist() == [2, 1, 0]
    assert state.queue.generation.tolist() == [1, 2, 1, 1]
    assert state.queue.arrival.tolist() == [0, 3, 2, 4]
    assert state.queue.num_preemptions.tolist() == [5, 0, 5, 0]


def more(first: Request, **changes) -> Request:
    """Returns one more sample of a request."""
    return dataclasses.replace(first, follows=True, **changes)


def test_the_samples_of_one_request_are_a_group_and_other_requests_are_groups_of_their_own():
    one, two = request(1), request(2, 3)
    state, _ = put(start(), one)
    state, handles = put(state, two, more(two), one)
    assert handles.row_id.tolist() == [1, 2, 3]
    assert state.queue.arrival.tolist() == [0, 1, 2, 3]
    assert state.queue.group.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("before", [[], [None], [request(5), None]])
def test_a_sample_that_follows_no_other_is_the_first_of_its_request(before):
    state, handles = put(start(), *before, more(request(1)))
    row = handles.row_id[len(before)]
    assert state.queue.group[row] == state.queue.arrival[row]
    assert state.queue.status[row] == Status.WAITING


def test_the_samples_of_one_request_are_taken_together_or_not_at_all_nor_is_what_comes_after():
    one, two = request(1), request(2)
    before, _ = put(start(), one, one)
    state, handles = put(before, two, more(two), one)
    assert handles.row_id.tolist() == [2, 3, NONE]
    state, handles = put(before, one, two, more(two))
    assert handles.row_id.tolist() == [2, NONE, NONE]
    assert int(state.next_arrival) == 3 and state.queue.status.tolist() == [*[Status.WAITING] * 3, Status.FREE]
    assert put(state, two, more(two), one)[1].row_id.tolist() == [NONE] * 3
    assert same(put(state, two, more(two), one)[0], state)


@pytest.mark.parametrize("other", [request(1, 3), request(1), request(1, 2, 3), request(1, 2, 3, prompt_length=2)])
def test_a_sample_with_another_prompt_than_the_first_ends_with_error(other):
    first = request(1, 2)
    state, _ = put(start(), first, dataclasses.replace(other, follows=True), more(first))
    expected = Status.WAITING if other.prompt_length == 2 and other.prompt[:2] == (1, 2) else Status.ERROR
    assert state.queue.status.tolist() == [Status.WAITING, expected, Status.WAITING, Status.FREE]
    assert state.queue.group.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "length, max_tokens, max_length",
    [(1, 1, 2), (3, 4, 7), (3, 5, 8), (3, 6, 8), (7, 1, 8), (7, 9, 8), (1, 2**31 - 1, 8), (7, 2**31 - 1, 8)],
)
def test_max_tokens_is_clipped_to_what_the_longest_sequence_leaves(length, max_tokens, max_length):
    state, _ = put(start(), request(*range(length), max_tokens=max_tokens))
    assert state.queue.max_length[0] == max_length


@pytest.mark.parametrize(
    "invalid",
    [
        request(),
        request(*range(8)),
        request(1, prompt_length=9),
        request(1, prompt_length=-1),
        request(1, prompt_length=-(2**31)),
        request(1, VOCAB_SIZE),
        request(1, -1),
        request(1, max_tokens=0),
        request(1, max_tokens=-5),
    ],
)
def test_an_invalid_row_ends_with_error_and_its_neighbours_are_served(invalid):
    state, handles = put(start(), request(1), invalid, request(2))
    assert handles.row_id.tolist() == [0, 1, 2] and handles.generation.tolist() == [1, 1, 1]
    assert state.queue.status.tolist() == [Status.WAITING, Status.ERROR, Status.WAITING, Status.FREE]
    marks = jnp.zeros((CONFIG.num_pages, CONFIG.page_size), jnp.int32)
    for _ in range(4):
        state, marks = STEP(state, marks)
        check_invariants(state)
    assert state.queue.status.tolist() == [Status.LENGTH, Status.ERROR, Status.LENGTH, Status.FREE]
    state = collect(state, rows(1), state.queue.generation)
    assert state.queue.status.tolist() == [Status.LENGTH, Status.FREE, Status.LENGTH, Status.FREE]


def test_tokens_behind_the_prompt_do_not_matter():
    state, _ = put(start(), request(1, 2, 77, -3, prompt_length=2))
    assert state.queue.status[0] == Status.WAITING


def test_sampling_parameters_are_kept_with_their_rows():
    state, _ = put(start(), request(1))
    state, handles = SUBMIT(state, submission_with(sampling_rows()))
    assert handles.row_id.tolist() == [1, 2, 3]
    assert state.queue.status.tolist() == [Status.WAITING] * 4
    kept = jax.tree.map(lambda leaf: leaf[1:4], state.queue.sampling)
    for field in dataclasses.fields(SamplingArrays):
        assert np.array_equal(getattr(kept, field.name), getattr(sampling_rows(), field.name)), field.name


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", np.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", np.nan),
        ("num_logprobs", -2),
        ("num_logprobs", 4),
    ],
)
def test_a_sampling_parameter_out_of_range_ends_its_row_with_error(field, value):
    values = getattr(sampling_rows(), field).tolist()
    state, _ = SUBMIT(start(), submission_with(sampling_rows(**{field: [values[0], value, values[2]]})))
    assert state.queue.status.tolist() == [Status.WAITING, Status.ERROR, Status.WAITING, Status.FREE]


def test_an_abort_is_noted_for_waiting_and_running_rows():
    state, _ = put(start(), request(1), request(2), request(3))
    state = with_status(state, Status.WAITING, Status.RUNNING, Status.WAITING, Status.FREE)
    state = abort(state, rows(0, 1), state.queue.generation)
    assert state.queue.abort_requested.tolist() == [True, True, False, False]
    again = abort(state, rows(2), state.queue.generation)
    assert again.queue.abort_requested.tolist() == [True, True, True, False]


@pytest.mark.parametrize("status", [Status.STOP, Status.LENGTH, Status.ABORT, Status.ERROR, Status.FREE])
def test_an_abort_of_a_row_that_is_not_unfinished_does_nothing(status):
    state, _ = put(start(), request(1))
    state = with_status(state, status, Status.FREE, Status.FREE, Status.FREE)
    assert same(abort(state, rows(0, 1, 2, 3), state.queue.generation), state)


@pytest.mark.parametrize("age", [-1, 1, 2])
def test_an_abort_of_another_generation_does_nothing(age):
    state, _ = put(start(), request(1), request(2))
    assert same(abort(state, rows(0, 1), state.queue.generation - age), state)


def test_an_abort_of_no_rows_does_nothing():
    state, _ = put(start(), request(1), request(2))
    assert same(abort(state, rows(), state.queue.generation), state)


def test_an_aborted_row_that_is_submitted_to_again_is_not_aborted():
    state, _ = put(start(), request(1))
    state = abort(state, rows(0), state.queue.generation)
    state = with_status(state, Status.FREE, Status.FREE, Status.FREE, Status.FREE)
    state, _ = put(state, request(2))
    assert not state.queue.abort_requested.any()


def test_collect_frees_finished_rows_of_the_mask_only():
    state, _ = put(start(), request(1), request(2), request(3))
    state, _ = put(state, request(4))
    state = with_status(state, Status.STOP, Status.LENGTH, Status.ABORT, Status.ERROR)
    collected = collect(state, rows(0, 2, 3), state.queue.generation)
    assert collected.queue.status.tolist() == [Status.FREE, Status.LENGTH, Status.FREE, Status.FREE]
    restored = with_status(collected, Status.STOP, Status.LENGTH, Status.ABORT, Status.ERROR)
    assert same(restored, state)


@pytest.mark.parametrize("status", [Status.WAITING, Status.RUNNING, Status.FREE])
def test_collect_of_an_unfinished_row_does_nothing(status):
    state, _ = put(start(), request(1))
    state = with_status(state, status, Status.FREE, Status.FREE, Status.FREE)
    assert same(collect(state, rows(0, 1, 2, 3), state.queue.generation), state)


@pytest.mark.parametrize("age", [-1, 1])
def test_collect_of_another_generation_does_nothing(age):
    state, _ = put(start(), request(1))
    state = with_status(state, Status.STOP, Status.FREE, Status.FREE, Status.FREE)
    assert same(collect(state, rows(0), state.queue.generation - age), state)


def test_finish_reasons_are_named_as_users_see_them():
    assert [status.finish_reason for status in Status] == [None, None, None, "stop", "length", "abort", "error"]
