"""The step and its loops: greedy parity with dense attention, and results that do not depend on company (promise P4)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import EngineConfig, SamplingParams
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.programs import programs
from jaxserve.core.scheduler import EngineState, Status, abort
from jaxserve.models import Transformer, causal_attend, graphdef_of
from pallas_kernels.native import library
from tests import workload
from tests.workload import BF16, CONFIG, MAX_NEW, MODEL, Asked, Traced, assert_same, greedy

LENGTH = CONFIG.max_model_len


@dataclasses.dataclass(frozen=True)
class Setup:
    """A precision, and the results of four requests in it when each is alone in the engine."""

    params: nnx.State
    config: EngineConfig
    targets: list[Asked]
    alone: list[Traced]

    def check(self, requests: Sequence[Asked], config: EngineConfig | None = None, **options) -> list[Traced]:
        """Runs a crowd with some targets; each must give the same results as alone. Returns these in their order."""
        traced = workload.trace(requests, self.params, config or self.config, **options)
        found = []
        for target, expected in zip(self.targets, self.alone, strict=True):
            for request, seen in zip(requests, traced, strict=True):
                if request.prompt == target.prompt:
                    assert_same(seen, expected)
                    found.append(seen)
        assert found
        return found


def make_targets() -> list[Asked]:
    rng = np.random.default_rng(7)
    kinds = [
        (75, greedy()),
        (57, greedy(temperature=1.2, seed=2**63 + 11)),
        (17, greedy(temperature=0.9, seed=3, top_p=0.9, top_k=20, min_p=0.02)),
        (5, greedy(temperature=1.5, seed=4, logprobs=None)),
    ]
    return [Asked(workload.make_prompt(rng, length), params) for length, params in kinds]


def short(prompt_length: int, max_tokens: int) -> Asked:
    """A request that takes `max_tokens` steps if its prompt fits into one chunk."""
    return Asked(tuple(range(prompt_length)), greedy(max_tokens=max_tokens))


SETUPS = ["float32-native", "bfloat16-native", "bfloat16-reference", "float32-reference", "bfloat16-triton"]


@pytest.fixture(scope="module", params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    dtype, _, backend = request.param.partition("-")
    if backend == "native" and not library.available():
        pytest.skip(f"native kernels: {library.why_not()}")
    config = CONFIG if dtype == "float32" else BF16
    config = dataclasses.replace(config, attention_backend=backend, interpret_kernels=backend == "triton")
    params, targets = workload.make_params(jnp.dtype(dtype)), make_targets()
    return Setup(params, config, targets, [workload.trace([target], params, config)[0] for target in targets])


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return workload.make_params()


@functools.cache
def dense_logits():
    """Logits of whole sequences, by the same model with dense attention."""

    @jax.jit
    def logits(params, tokens):
        model: Transformer = nnx.merge(graphdef_of(MODEL), params)
        positions = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape[0])
        hidden, _ = model(tokens.reshape(-1), positions, attend=causal_attend(len(tokens), LENGTH), kv=None)
        return model.logits(hidden).reshape(*tokens.shape, MODEL.vocab_size)

    return logits


def assert_dense_agrees(
    params: nnx.State, requests: Sequence[Asked], tokens: Sequence[Sequence[int]], logprobs
) -> None:
    """Each token is the dense model's most likely one after those before it, near-ties aside."""
    rows = np.zeros((CONFIG.queue_size, LENGTH), np.int32)
    for row, request, generated in zip(rows, requests, tokens, strict=False):
        row[: len(request.prompt) + len(generated)] = (*request.prompt, *generated)
    all_logits = np.asarray(dense_logits()(params, rows))
    for i, request in enumerate(requests):
        first = len(request.prompt) - 1
        logits = all_logits[i, first : first + len(tokens[i])].astype(np.float64)
        chosen = logits[np.arange(len(logits)), tokens[i]]
        assert np.all(chosen >= logits.max(axis=1) - 1e-5 * np.abs(logits).max(axis=1)), i
        np.testing.assert_allclose(logprobs[i], chosen - np.log(np.exp(logits).sum(axis=1)), atol=1e-4)


def test_greedy_tokens_are_those_of_dense_attention_in_a_crowd_with_preemptions_and_chunks(params):
    requests = [dataclasses.replace(asked, params=greedy()) for asked in workload.crowd(1, CONFIG.queue_size)]
    state, results = jax.device_get(workload.run_program(CONFIG)(params, workload.start(requests, CONFIG)))
    assert state.queue.num_preemptions.sum() >= 3
    assert max(len(asked.prompt) for asked in requests) > 3 * CONFIG.chunk_size
    assert results.num_generated.tolist() == [MAX_NEW] * len(requests)
    assert np.all(results.status == Status.LENGTH)
    assert_dense_agrees(params, requests, results.token_ids, results.logprobs)


def test_the_dense_oracle_notices_one_wrong_token(params):
    (asked,) = workload.crowd(1, 1)
    (seen,) = workload.trace([asked], params, CONFIG)
    wrong = list(seen.tokens)
    wrong[3] = (wrong[3] + 1) % MODEL.vocab_size
    with pytest.raises(AssertionError):
        assert_dense_agrees(params, [asked], [wrong], [seen.logprobs])


def test_a_request_alone_ends_once_with_its_reason(setup):
    for target, seen in zip(setup.targets, setup.alone, strict=True):
        assert seen.status == Status.LENGTH
        assert len(seen.tokens) == target.params.max_tokens
        assert sum(seen.chunks) == len(target.prompt) + len(seen.tokens) - 1
        assert len(set(seen.tokens)) > 5  # or else the comparisons below would say little


def test_a_stop_token_ends_a_request_where_it_falls_and_not_its_neighbours(params):
    asked = workload.crowd(2, 4, plain=True)
    before = workload.trace(asked, params, CONFIG)
    token = next(token for token in before[0].tokens if token != before[0].tokens[0])
    place = before[0].tokens.index(token)
    changed = dataclasses.replace(asked[0], params=greedy(stop_token_ids=[token], logprobs=None))
    after = workload.trace([changed, *asked[1:]], params, CONFIG)
    assert after[0].tokens == before[0].tokens[: place + 1]
    assert after[0].status == Status.STOP
    for seen, expected in zip(after[1:], before[1:], strict=True):
        assert_same(seen, expected)


def test_results_do_not_depend_on_neighbours_slots_arrival_order_or_chunks(setup):
    slots, chunks, preempted = [set() for _ in setup.targets], [set() for _ in setup.targets], 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        requests = [*setup.targets, *workload.crowd(seed, 8)]
        requests = [dataclasses.replace(asked, arrival=int(rng.integers(0, 12))) for asked in requests]
        for i, seen in enumerate(setup.check([requests[place] for place in rng.permutation(len(requests))])):
            slots[i].add(seen.slots[0])
            chunks[i].add(tuple(chunk for chunk in seen.chunks if chunk > 1))
            preempted += seen.num_preemptions
    assert min(map(len, slots)) >= 2
    assert min(map(len, chunks[:2])) >= 2
    assert sum(map(len, chunks)) >= 8
    assert preempted


def test_results_do_not_depend_on_own_preemptions(setup):
    page_size = setup.config.page_size
    for target in setup.targets:
        victim = dataclasses.replace(target, priority=1)  # it is preempted whichever sequence runs out of pages
        num_left = (
            setup.config.num_pages - len(target.prompt) // page_size - 5
        )  # pages, of which the neighbours get all
        lengths = [page_size * (num_left // 3)] * 2 + [page_size * (num_left - num_left // 3 * 2)]
        neighbours = [dataclasses.replace(short(length, MAX_NEW), arrival=5 + i) for i, length in enumerate(lengths)]
        (seen,) = setup.check([victim, *neighbours])
        assert seen.num_preemptions >= 1
        recomputed = sum(seen.chunks) - (len(target.prompt) + len(seen.tokens) - 1)
        assert recomputed > len(target.prompt)  # it had generated tokens, which a chunk recomputed


def test_results_do_not_depend_on_what_neighbours_ask_for(setup):
    asking = workload.crowd(9, 8)
    everything = SamplingParams(temperature=1.0, top_p=0.5, top_k=3, min_p=0.1, logprobs=3, max_tokens=MAX_NEW, seed=5)
    for neighbour in (
        greedy(logprobs=None),
        everything,
        greedy(logprobs=3),
        greedy(temperature=1.0, seed=6, top_p=0.3),
    ):
        setup.check([*setup.targets, *(dataclasses.replace(asked, params=neighbour) for asked in asking)])


def test_results_do_not_depend_on_the_chunk_size(setup):
    config = dataclasses.replace(setup.config, chunk_size=7)
    for seen in setup.check([*setup.targets, *workload.crowd(4, 6)], config):
        assert max(seen.chunks) <= config.chunk_size


def test_what_the_pool_holds_outside_of_computed_positions_is_never_read(setup):
    requests = [*workload.crowd(3, 8), *setup.targets]
    traced = workload.trace(requests, setup.params, setup.config)
    poisoned = setup.check(requests, after_step=poison)
    for seen, expected in zip(poisoned, traced[8:], strict=True):
        assert_same(seen, expected)


def test_a_sequence_that_reads_nan_ends_with_an_error_and_disturbs_no_other(setup):
    """Also the control of the test above: a poisoned position that was computed does reach the result."""
    requests = [*workload.crowd(1, 1), *setup.targets]
    num_steps = iter(range(1000))

    def poison_first_row_after_six_steps(state: EngineState) -> EngineState:
        (slot,) = np.flatnonzero(np.asarray(state.slots.row_id) == 0) if next(num_steps) == 6 else (None,)
        if slot is None:
            return state
        page = int(state.table.page_ids[slot, 0])
        nan = 0x7FC0 if state.pool.k[0].dtype == jnp.uint16 else jnp.nan
        return state.replace(pool=jax.tree.map(lambda pages: pages.at[page].set(nan), state.pool))

    (untouched, *_), (seen, *others) = (
        workload.trace(requests, setup.params, setup.config, **options)
        for options in ({}, {"after_step": poison_first_row_after_six_steps})
    )
    assert seen.status == Status.ERROR
    assert 0 < len(seen.tokens) < len(untouched.tokens)
    assert seen.tokens == untouched.tokens[: len(seen.tokens)]
    for other, expected in zip(others, setup.alone, strict=True):
        assert_same(other, expected)


def poison(state: EngineState) -> EngineState:
    """NaN in every position of the pool that holds no sequence's key and value: free pages, and tails of pages in use."""
    slots, table = jax.device_get((state.slots, state.table))
    num_pages, _, page_size, _ = state.pool.k[0].shape
    computed = np.zeros((num_pages, page_size), bool)
    for slot in np.flatnonzero(np.asarray(state.active)):
        position = np.arange(slots.num_computed[slot])
        computed[table.page_ids[slot, position // page_size], position % page_size] = True
    assert not computed[table.free[: table.num_free]].any()

    def poisoned(pages: jax.Array) -> jax.Array:
        nan = np.uint16(0x7FC0) if pages.dtype == jnp.uint16 else np.array(np.nan, pages.dtype)
        return jnp.asarray(np.where(computed[:, None, :, None], np.asarray(pages), nan))

    return state.replace(pool=jax.tree.map(poisoned, state.pool))


@pytest.mark.parametrize("setup", SETUPS[:3], indirect=True)  # the loops around a step are the same for all backends
def test_step_run_steps_and_run_give_the_same(setup):
    requests = [*setup.targets, *workload.crowd(5, 8)]
    traced = workload.trace(requests, setup.params, setup.config)
    assert sum(seen.num_preemptions for seen in traced)
    final, results = jax.device_get(
        workload.run_program(setup.config)(setup.params, workload.start(requests, setup.config))
    )
    for row, expected in enumerate(traced):
        workload.assert_run_agrees(results, row, expected)
        assert final.queue.num_preemptions[row] == expected.num_preemptions

    state, streamed = workload.start(requests, setup.config), [Traced() for _ in requests]
    while workload.has_unfinished(state):
        state, outputs = programs(MODEL, setup.config)["run_steps"](setup.params, state, jnp.int32(5))
        outputs = jax.device_get(outputs)
        for index in range(outputs.num_steps):
            output = jax.tree.map(lambda leaf, index=index: leaf[index], outputs.steps)
            workload.note(output, {row: row for row in range(len(requests))}, streamed)
    for seen, expected in zip(streamed, traced, strict=True):
        assert_same(seen, expected)
        assert (seen.slots, seen.chunks) == (expected.slots, expected.chunks)


def run_steps(params: nnx.State, state: EngineState, number: int) -> tuple[EngineState, int]:
    state, outputs = programs(MODEL, CONFIG)["run_steps"](params, state, jnp.int32(number))
    return state, int(outputs.num_steps)


def test_run_steps_returns_when_a_row_finishes_and_none_waits(params):
    state = workload.start([short(3, 4), short(3, 9)], CONFIG)
    state, num_steps = run_steps(params, state, 16)
    assert num_steps == 4
    assert state.queue.status[:2].tolist() == [Status.LENGTH, Status.RUNNING]
    state, num_steps = run_steps(params, state, 16)
    assert num_steps == 5
    assert state.queue.status[:2].tolist() == [Status.LENGTH, Status.LENGTH]


def test_run_steps_goes_on_after_a_finish_while_rows_wait(params):
    state = workload.start([short(2, 2), *(short(2, 12) for _ in range(3)), short(2, 3), short(2, 4)], CONFIG)
    state, num_steps = run_steps(params, state, 16)
    assert num_steps == 2 + 3 + 4  # one after the other in the first slot; only the last one leaves no other waiting
    assert state.queue.status[:6].tolist() == [4, 2, 2, 2, 4, 4]


def test_run_steps_returns_when_a_row_was_aborted_and_none_waits(params):
    state = workload.start([short(2, 12), short(2, 12)], CONFIG)
    state = abort(state, jnp.arange(CONFIG.queue_size) == 0, state.queue.generation)
    state, num_steps = run_steps(params, state, 16)
    assert num_steps == 1
    assert state.queue.status[:2].tolist() == [Status.ABORT, Status.RUNNING]


def test_run_steps_does_as_many_steps_as_it_is_told_without_compiling_for_each_number(params):
    def left_after(number: int, state: EngineState) -> tuple[int, int]:
        state, num_steps = run_steps(params, state, number)
        return num_steps, int(state.queue.num_tokens[0])

    asked = short(2, MAX_NEW)
    states = [workload.start([asked], CONFIG) for _ in range(6)]
    left_after(1, states[0])
    with forbid_compilation():
        assert left_after(0, states[1]) == (0, 2)
        assert left_after(1, states[2]) == (1, 3)
        assert left_after(7, states[3]) == (7, 9)
        assert left_after(16, states[4]) == (16, 18)
        assert left_after(1000, states[5]) == (16, 18)


def test_run_steps_stops_when_nothing_is_left(params):
    _, num_steps = run_steps(params, workload.start([], CONFIG), 16)
    assert num_steps == 0
