"""n samples of one request: the bits of n requests with the same sample indices, on fewer pages and with less to compute."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import EngineConfig, SamplingParams
from jaxserve.core.make_submission import make_submission
from jaxserve.core.programs import programs
from jaxserve.core.scheduler import EngineState, Status, Submission, abort, check_invariants, init_state
from tests import workload
from tests.workload import CONFIG, MAX_NEW, MODEL, Asked, Traced, assert_same

ROOMY = dataclasses.replace(CONFIG, num_pages=64, max_slots=4)  # four longest sequences fit
# The smallest pool, chunks that end everywhere within a page, more samples than slots.
TIGHT = dataclasses.replace(CONFIG, num_pages=16, chunk_size=3, max_slots=3)
WIDE = dataclasses.replace(CONFIG, num_pages=24, chunk_size=50, max_slots=8)
TRITON = dataclasses.replace(CONFIG, kv_dtype="bfloat16", attention_backend="triton", interpret_kernels=True)


@dataclasses.dataclass
class History:
    """The results of a batch of samples, and the use of the pool."""

    samples: list[Traced]
    peak_pages: int = 0
    num_shared: int = 0  # pages, most at one time
    num_computed: int = 0  # tokens, over all steps


def sampled(n: int = 4, **changes) -> SamplingParams:
    return workload.greedy(**{"temperature": 1.2, "seed": 11, "n": n} | changes)


def asked(length: int, params: SamplingParams, **changes) -> Asked:
    """A request with a prompt of its own."""
    return Asked(workload.make_prompt(np.random.default_rng(length), length), params, **changes)


def single(request: Asked, sample_index: int, config: EngineConfig) -> Submission:
    """One sample of a request, as a request of its own."""
    params = dataclasses.replace(request.params, n=1)
    rows = make_submission([request.prompt], [params], model=MODEL, config=config, num_rows=config.queue_size)
    rows.sampling.sample_index[0] = sample_index
    return rows


def follow(
    submissions: dict[int, Submission],
    params: nnx.State,
    config: EngineConfig,
    *,
    step=None,
    aborted: Sequence[int] = (),
    abort_at: int = 5,
) -> History:
    """Runs until nothing is left; each submission arrives before the step that it is under. Checks every state."""
    step = step or programs(MODEL, config)["step"]
    state, history, rows, index = init_state(MODEL, config), History([]), {}, 0
    while index <= max(submissions) or workload.has_unfinished(state):
        if index in submissions:
            state, handles = workload.submit_program(config)(state, submissions[index])
            taken = [row for row in handles.row_id.tolist() if row < config.queue_size]
            assert len(taken) == submissions[index].valid.sum()
            rows |= {row: len(history.samples) + i for i, row in enumerate(taken)}
            history.samples += [Traced() for _ in taken]
        if index == abort_at and aborted:
            state = abort(state, jnp.isin(jnp.arange(config.queue_size), jnp.array(aborted)), state.queue.generation)
        state, output = step(params, state)
        check_invariants(state)
        output = jax.device_get(output)
        workload.note(output, rows, history.samples)
        history.peak_pages = max(history.peak_pages, config.num_pages - int(output.num_free_pages))
        history.num_shared = max(history.num_shared, int((state.table.reference_count > 1).sum()))
        history.num_computed += int(output.num_new.sum())
        index += 1
    for row, i in rows.items():
        history.samples[i].num_preemptions = int(state.queue.num_preemptions[row])
        history.samples[i].status = Status(int(state.queue.status[row]))
    return history


def together(requests: Sequence[Asked], params: nnx.State, config: EngineConfig, **options) -> History:
    """All samples of all requests, the requests arriving when they say."""
    arrivals = sorted({request.arrival for request in requests})
    due = {arrival: [request for request in requests if request.arrival == arrival] for arrival in arrivals}
    return follow({step: workload.submission_of(due[step], config) for step in due}, params, config, **options)


def without_sharing(submission: Submission) -> Submission:
    return submission.replace(follows=np.zeros_like(submission.follows))


@functools.cache
def params_of(kv_dtype: str) -> nnx.State:
    return workload.make_params(jnp.dtype(kv_dtype))


@functools.cache
def alone(request: Asked, sample_index: int, config: EngineConfig) -> Traced:
    history = follow({0: single(request, sample_index, config)}, params_of(config.kv_dtype), config)
    return history.samples[0]


def check_samples(requests: Sequence[Asked], history: History, config: EngineConfig) -> None:
    """Checks that every sample equals the same sample alone in an engine with configuration `config`."""
    in_order = sorted(requests, key=lambda request: request.arrival)
    expected = [
        alone(dataclasses.replace(request, arrival=0), index, config)
        for request in in_order
        for index in range(request.params.n)
    ]
    assert len(history.samples) == len(expected)
    for seen, wanted in zip(history.samples, expected, strict=True):
        assert_same(seen, wanted)


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, id="nothing to share"),
        pytest.param(5, id="part of a page"),
        pytest.param(8, id="a page with the last token in it"),
        pytest.param(9, id="one full page"),
        pytest.param(57, id="full pages only"),
        pytest.param(75, id="full pages and part of one"),
    ],
)
def test_samples_are_bitwise_those_of_separate_requests(length):
    request = asked(length, sampled(3))
    history = together([request], params_of("float32"), ROOMY)
    check_samples([request], history, ROOMY)
    assert len({tuple(sample.tokens) for sample in history.samples}) == 3
    assert history.num_shared == (length - 1) // ROOMY.page_size


def test_samples_share_the_pages_of_their_prompt_and_compute_it_once():
    length, n = 75, 4
    shared, pages = (length - 1) // 8, -(-(length + MAX_NEW - 1) // 8)
    request, params = asked(length, sampled(n)), params_of("float32")
    history = together([request], params, ROOMY)
    assert history.peak_pages == shared + n * (pages - shared)
    assert history.num_computed == length - 1 + n * MAX_NEW
    apart = follow({0: without_sharing(workload.submission_of([request], ROOMY))}, params, ROOMY)
    assert apart.peak_pages > 2 * history.peak_pages
    assert apart.num_computed == n * (length - 1 + MAX_NEW)
    for one, other in zip(history.samples, apart.samples, strict=True):
        assert_same(one, other)


def crowd() -> list[Asked]:
    """Requests with several samples among others, of ends that differ."""
    stops = sampled(3, seed=5, stop_token_ids=list(range(0, 128, 16)))
    return [
        asked(30, workload.greedy()),
        asked(43, stops),
        asked(14, sampled(1, seed=3), arrival=1),
        asked(75, sampled(2, top_k=20), arrival=3),
        asked(26, sampled(4, max_tokens=9, seed=2**63), arrival=7, priority=-1),
    ]


@pytest.mark.parametrize("config", [CONFIG, TIGHT, WIDE], ids=["plain", "tight", "wide"])
def test_samples_in_a_crowd_are_those_of_separate_requests_whatever_chunks_slots_and_pool(config):
    requests = crowd()
    history = together(requests, params_of("float32"), config)
    check_samples(requests, history, ROOMY)
    assert history.num_shared > 0
    assert {sample.status for sample in history.samples} == {Status.STOP, Status.LENGTH}
    if config is TIGHT:
        assert any(sample.num_preemptions for sample in history.samples)


def test_samples_are_bitwise_those_of_separate_requests_with_kernels():
    requests = [asked(43, sampled(3, max_tokens=6)), asked(13, sampled(2, max_tokens=12), arrival=2)]
    history = together(requests, params_of("bfloat16"), TRITON)
    check_samples(requests, history, TRITON)
    assert history.num_shared > 0


def test_more_samples_than_slots_borrow_the_prompt_as_slots_come_free():
    request = asked(43, sampled(9, max_tokens=5))
    history = together([request], params_of("float32"), ROOMY)
    check_samples([request], history, ROOMY)
    assert history.num_computed == 42 + 9 * 5


def test_a_preempted_sample_resumes_on_the_pages_of_the_others():
    request = asked(75, sampled(3, max_tokens=MAX_NEW))
    config = TIGHT
    history = together([request], params_of("float32"), config)
    check_samples([request], history, ROOMY)
    again = history.num_computed - (75 - 1 + 3 * MAX_NEW)
    num_preemptions = sum(sample.num_preemptions for sample in history.samples)
    assert num_preemptions > 0
    assert 0 <= again <= num_preemptions * MAX_NEW  # not the prompt


def test_the_samples_that_are_left_go_on_when_the_lender_is_aborted():
    request = asked(43, sampled(3))
    history = together([request], params_of("float32"), ROOMY, aborted=[0])
    assert [sample.status for sample in history.samples] == [Status.ABORT, Status.LENGTH, Status.LENGTH]
    for index in (1, 2):
        assert_same(history.samples[index], alone(request, index, ROOMY))
    whole = alone(request, 0, ROOMY)
    assert history.samples[0].tokens == whole.tokens[: len(history.samples[0].tokens)]
    assert history.num_shared == 5


def test_samples_of_one_token_do_not_wait_for_one_another():
    request = asked(9, sampled(4, max_tokens=1))
    history = together([request], params_of("float32"), ROOMY)
    check_samples([request], history, ROOMY)
    assert history.num_computed == 4 * 9


def test_a_run_in_one_program_gives_the_same():
    requests = [dataclasses.replace(request, arrival=0) for request in crowd()]
    state, _ = workload.submit_program(CONFIG)(init_state(MODEL, CONFIG), workload.submission_of(requests, CONFIG))
    _, results = jax.device_get(workload.run_program(CONFIG)(params_of("float32"), state))
    expected = [alone(request, index, ROOMY) for request in requests for index in range(request.params.n)]
    for row, wanted in enumerate(expected):
        workload.assert_run_agrees(results, row, wanted)


@pytest.mark.slow
def test_a_copy_left_out_would_be_noticed(monkeypatch):
    step_module = importlib.import_module("jaxserve.core.step")  # as a name of the package it is the function
    monkeypatch.setattr(step_module, "copy_pages", lambda pool, source, target: pool)
    broken = jax.jit(functools.partial(step_module.step, model=MODEL, config=ROOMY))
    request = asked(75, sampled(3))
    history = together([request], params_of("float32"), ROOMY, step=broken)
    assert_same(history.samples[0], alone(request, 0, ROOMY))
    for index in (1, 2):
        with pytest.raises(AssertionError):
            assert_same(history.samples[index], alone(request, index, ROOMY))


@pytest.mark.parametrize("name", ["step", "run"])
def test_samples_are_refused_nowhere_in_a_pool_of_one_longest_sequence(name):
    """A group that fills the pool: each of its members needs nearly all pages."""
    request = asked(110, sampled(3, max_tokens=18))
    if name == "step":
        history = together([request], params_of("float32"), TIGHT)
        check_samples([request], history, ROOMY)
        return
    state = workload.submit_program(TIGHT)(init_state(MODEL, TIGHT), workload.submission_of([request], TIGHT))[0]
    state, results = jax.device_get(workload.run_program(TIGHT)(params_of("float32"), state))
    assert results.status[:3].tolist() == [Status.LENGTH] * 3
    assert int(state.table.num_free) == TIGHT.num_pages


def test_rows_are_given_to_all_samples_of_a_request_or_to_none():
    config = ROOMY
    fits, too_many = asked(9, sampled(9)), asked(10, sampled(4))
    state: EngineState = init_state(MODEL, config)
    rows = make_submission([fits.prompt, too_many.prompt], [fits.params, too_many.params], model=MODEL, config=config)
    state, handles = workload.submit_program(config)(state, rows)
    assert handles.row_id.tolist() == [*range(9), *[config.queue_size] * 4]
    assert state.queue.status.tolist() == [Status.WAITING] * 9 + [Status.FREE] * 3
