"""Counts of seen tokens against counting in Python, and their effect on penalties in whole steps."""

import collections
import dataclasses
import functools
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import EngineConfig, ModelConfig, SamplingParams
from jaxserve.core.make_submission import make_submission
from jaxserve.core.scheduler import (
    EngineState,
    Status,
    abort,
    check_invariants,
    collect,
    init_state,
    submit,
    token_counts,
)
from jaxserve.core.scheduler.transitions import finish_step, samples, schedule
from jaxserve.core.step import run
from tests import small_model, workload
from tests.core.scheduler.traces import FAST_COMPILE
from tests.workload import Asked, Traced, assert_same, greedy

VOCAB = 11
MODEL = ModelConfig("llama", VOCAB, 2, 2, 1, 1, 1, 2)
CONFIG = EngineConfig(
    max_slots=3,
    num_pages=14,  # three longest sequences would need 36
    page_size=8,
    max_model_len=96,
    chunk_size=40,
    max_queue=5,
    max_stop_token_ids=1,
    kv_dtype="float32",
)
NO_PENALTIES = dataclasses.replace(CONFIG, penalties=False)
PENALTIES = ({"presence_penalty": 1}, {"frequency_penalty": -1}, {"repetition_penalty": 2})


def scripted_token(row: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the token of a stub model: few different tokens, many of them repeated."""
    return (row * 5 + position // 2 * position) % VOCAB


def make_step() -> Callable[[EngineState], tuple[EngineState, jax.Array, EngineState]]:
    """A step without a model. Gives the state when tokens are drawn, which slots do, and the state after it."""

    @jax.jit
    def step(state: EngineState) -> tuple[EngineState, jax.Array, EngineState]:
        state, plan = schedule(state, config=CONFIG)
        sampled = samples(state, plan.num_new)
        counted = token_counts.count_tokens(state, sampled)
        position = counted.queue.num_tokens.at[counted.slots.row_id].get(mode="fill", fill_value=0)
        token = scripted_token(counted.queue.arrival.at[counted.slots.row_id].get(mode="clip"), position)
        return counted, sampled, finish_step(counted, plan.num_new, token)

    return step


SUBMIT = jax.jit(lambda state, submission: submit(state, submission, model=MODEL, config=CONFIG)[0])


def submission_of(requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> Any:
    prompts, params = zip(*requests, strict=True)
    return make_submission(prompts, params, model=MODEL, config=CONFIG, num_rows=CONFIG.queue_size)


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    length = rng.choice([1, 5, 31, 32, 33, 64, 70, rng.randint(1, 80)])
    kind = rng.choice([*PENALTIES, {}])
    return [rng.randrange(VOCAB) for _ in range(length)], SamplingParams(max_tokens=rng.randint(1, 30), **kind)


def expected_counts(tokens: Sequence[int], prompt_length: int) -> list[int]:
    generated = collections.Counter(tokens[prompt_length:])
    return [2 * generated[token] + (token in tokens[:prompt_length]) for token in range(VOCAB)]


def run_random_trace(seed: int, num_steps: int) -> collections.Counter[str]:
    """Compares the counts after every step; returns the number of each event."""
    rng, step, state = random.Random(seed), make_step(), init_state(MODEL, CONFIG)
    events: collections.Counter[str] = collections.Counter()
    last_row: dict[int, tuple[int, int]] = {}  # by slot: the row whose tokens were counted, and its generation
    for _ in range(num_steps):
        done = state.queue.status >= Status.STOP
        state = collect(state, done, state.queue.generation)
        free = int(np.sum(np.asarray(state.queue.status) == Status.FREE))
        if free and rng.random() < 0.5:
            state = SUBMIT(state, submission_of([random_request(rng) for _ in range(rng.randint(1, free))]))
        if rng.random() < 0.03:
            state = abort(
                state, jnp.arange(CONFIG.queue_size) == rng.randrange(CONFIG.queue_size), state.queue.generation
            )
        seen_before = np.asarray(state.seen)
        counted, sampled, state = jax.device_get(step(state))
        check_invariants(state)
        queue, slots = counted.queue, counted.slots
        for slot, row in enumerate(slots.row_id):
            if row == CONFIG.queue_size:
                continue
            rules = jax.tree.map(lambda leaf, row=row: leaf[row], queue.rules)
            has_penalties = bool(rules.presence_penalty or rules.frequency_penalty or rules.repetition_penalty != 1)
            if not (has_penalties and sampled[slot]):
                assert counted.seen[slot].tolist() == seen_before[slot].tolist()
                assert slots.num_counted[slot] == 0  # nothing was spent on it, now or before
                events["left alone"] += 1
                continue
            length, prompt_length = queue.num_tokens[row], queue.prompt_length[row]
            tokens = queue.tokens[row, :length].tolist()
            assert counted.seen[slot].tolist() == expected_counts(tokens, prompt_length)
            assert slots.num_counted[slot] == length
            name = row, queue.generation[row]
            events["counted"] += 1
            events["long prompt"] += prompt_length > 32
            events["resumed"] += last_row.get(slot) != name and length > prompt_length
            events["slot reused"] += slot in last_row and last_row[slot] != name
            last_row[slot] = name
    return events


@pytest.mark.parametrize(("seed", "tokens_per_trip"), [(0, None), (1, 5)])
def test_counts_are_those_of_plain_counting_over_random_traces(monkeypatch, seed, tokens_per_trip):
    if tokens_per_trip:
        monkeypatch.setattr(token_counts, "_TOKENS_PER_TRIP", tokens_per_trip)
    events = run_random_trace(seed, 400)
    assert events["counted"] > 300 and events["left alone"] > 100, events
    assert min(events[name] for name in ("long prompt", "resumed", "slot reused")) >= 3, events


def test_the_random_traces_notice_counts_of_the_sequence_before_in_the_slot(monkeypatch):
    monkeypatch.setattr(token_counts, "if_any", lambda wanted, compute, otherwise: otherwise)
    with pytest.raises(AssertionError):
        run_random_trace(0, 250)


def count_trips(
    monkeypatch: pytest.MonkeyPatch, state: EngineState, sampled: Sequence[bool]
) -> tuple[int, EngineState]:
    """`count_tokens` with a loop that counts."""
    trips = 0

    def while_loop(condition, body, carry):
        nonlocal trips
        while condition(carry):
            carry, trips = body(carry), trips + 1
        return carry

    monkeypatch.setattr(token_counts, "lax", types.SimpleNamespace(while_loop=while_loop))
    state = token_counts.count_tokens(state, jnp.array(sampled))
    return trips, state


def in_slots(*requests: tuple[int, dict[str, float]], num_generated: int = 0) -> EngineState:
    """Requests with prompts of these lengths, each in the slot of its number, with some tokens generated."""
    state = init_state(MODEL, CONFIG)
    state = SUBMIT(state, submission_of([([1] * length, SamplingParams(**kind)) for length, kind in requests]))
    row_id = [row if row < len(requests) else CONFIG.queue_size for row in range(CONFIG.max_slots)]
    queue = state.queue.replace(num_tokens=state.queue.num_tokens + num_generated)
    return state.replace(queue=queue, slots=state.slots.replace(row_id=jnp.array(row_id, jnp.int32)))


@pytest.mark.parametrize(
    ("length", "num_trips"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)], ids=lambda value: str(value)
)
def test_a_prompt_takes_a_trip_per_32_tokens_and_a_generated_token_takes_one(monkeypatch, length, num_trips):
    state = in_slots((length, PENALTIES[0]))
    trips, state = count_trips(monkeypatch, state, [True] * 3)
    assert trips == num_trips
    assert count_trips(monkeypatch, state, [True] * 3)[0] == 0  # all is known
    longer = state.replace(queue=state.queue.replace(num_tokens=state.queue.num_tokens + 1))
    assert count_trips(monkeypatch, longer, [True] * 3)[0] == 1


def test_slots_are_counted_side_by_side_and_rows_without_penalties_take_no_trip(monkeypatch):
    state = in_slots((70, {}), (40, {}), (9, {}))
    assert count_trips(monkeypatch, state, [True] * 3)[0] == 0
    trips, state = count_trips(monkeypatch, in_slots((80, {}), (40, PENALTIES[1]), (9, PENALTIES[2])), [True] * 3)
    assert trips == 2
    assert state.slots.num_counted.tolist() == [0, 40, 9]
    waiting = in_slots((80, PENALTIES[0]), (9, PENALTIES[0]))
    assert count_trips(monkeypatch, waiting, [False, True, False])[0] == 1  # the first one draws nothing yet


def test_without_penalties_in_the_config_there_is_nothing_to_count():
    state = init_state(MODEL, NO_PENALTIES)
    assert state.seen is None
    assert token_counts.count_tokens(state, jnp.ones(3, bool)) is state


# Whole steps: a request with penalties gets the same tokens alone, in a crowd, and when preempted.

TARGETS = [
    (75, {"repetition_penalty": 1.3}),
    (57, {"temperature": 1.2, "seed": 2**63 + 11, "frequency_penalty": 0.7, "presence_penalty": 0.5}),
    (17, {"presence_penalty": -1.5, "frequency_penalty": -0.2, "logprobs_mode": "processed"}),
    (5, {"temperature": 0.8, "seed": 4, "repetition_penalty": 0.8, "bad_words": [[3], [4, 5]], "logit_bias": {6: 2}}),
]


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return workload.make_params()


@pytest.fixture(scope="module")
def targets() -> list[Asked]:
    rng = np.random.default_rng(7)
    return [Asked(workload.make_prompt(rng, length), greedy(**fields)) for length, fields in TARGETS]


@pytest.fixture(scope="module")
def alone(params: nnx.State, targets: list[Asked]) -> list[Traced]:
    return [workload.trace([target], params, workload.CONFIG)[0] for target in targets]


def crowd(seed: int, number: int) -> list[Asked]:
    """Neighbours, two thirds of which have penalties of their own."""
    kinds = ({}, {"repetition_penalty": 1.7}, {"presence_penalty": 2, "frequency_penalty": 1})
    return [
        dataclasses.replace(asked, params=asked.params.override(kinds[i % 3]))
        for i, asked in enumerate(workload.crowd(seed, number))
    ]


def assert_as_alone(
    requests: Sequence[Asked], params: nnx.State, targets: list[Asked], alone: list[Traced]
) -> list[Traced]:
    """Checks that targets among these requests give the same results as alone; returns these in their order."""
    traced = {
        request.prompt: seen
        for request, seen in zip(requests, workload.trace(requests, params, workload.CONFIG), strict=True)
    }
    found = [
        (traced[target.prompt], one) for target, one in zip(targets, alone, strict=True) if target.prompt in traced
    ]
    for seen, expected in found:
        assert_same(seen, expected)
    return [seen for seen, _ in found]


def test_penalties_change_what_each_request_gets(params, targets, alone):
    plain = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    for target, seen in zip(targets, alone, strict=True):
        assert seen.status == Status.LENGTH and len(seen.tokens) == workload.MAX_NEW
        without = dataclasses.replace(target, params=target.params.override(plain))
        assert workload.trace([without], params, workload.CONFIG)[0].tokens != seen.tokens


def test_a_request_with_penalties_gets_the_same_in_a_crowd(params, targets, alone):
    num_preempted, slots = 0, [set() for _ in targets]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        requests = [*targets, *crowd(seed, 8)]
        requests = [dataclasses.replace(asked, arrival=int(rng.integers(0, 12))) for asked in requests]
        found = assert_as_alone([requests[i] for i in rng.permutation(len(requests))], params, targets, alone)
        for i, seen in enumerate(found):
            slots[i].add(seen.slots[0])
            num_preempted += seen.num_preemptions
    assert min(map(len, slots)) >= 2 and num_preempted


def test_a_request_with_penalties_that_is_preempted_gets_the_same(params, targets, alone):
    page_size, num_pages = workload.CONFIG.page_size, workload.CONFIG.num_pages
    assert num_pages is not None
    for target in targets:
        victim = dataclasses.replace(target, priority=1)
        num_left = num_pages - len(target.prompt) // page_size - 5  # pages, of which the neighbours get all
        lengths = [page_size * (num_left // 3)] * 2 + [page_size * (num_left - num_left // 3 * 2)]
        neighbours = [
            Asked(tuple(range(length)), greedy(repetition_penalty=1.2), arrival=5 + i)
            for i, length in enumerate(lengths)
        ]
        (seen,) = assert_as_alone([victim, *neighbours], params, targets, alone)
        assert seen.num_preemptions >= 1
        assert sum(seen.chunks) > 2 * len(target.prompt) + len(seen.tokens) - 1  # generated tokens were counted again


@pytest.mark.slow
def test_greedy_tokens_with_rules_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(small_model.write_checkpoint(tmp_path)), dtype=torch.float32
    )
    config = EngineConfig(**small_model.CAPACITIES, kv_dtype="float32", max_stop_sequences=0)
    rng, num_new = np.random.default_rng(3), 24
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 2.5},
        {"repetition_penalty": 1.2},
        {},
    ]
    prompts = [rng.integers(1, small_model.MODEL.vocab_size, length).tolist() for length in (3, 40, 17, 9)]

    def generated(prompt: list[int], repetition_penalty: float | None = None, bad_words: Any = None) -> list[int]:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=num_new,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=repetition_penalty,
            bad_words_ids=bad_words,
        )
        return output[0, len(prompt) :].tolist()

    plain = [generated(prompt) for prompt in prompts]
    kinds[2]["bad_words"] = [plain[2][:1], plain[2][4:6]]
    expected = [generated(prompt, **kind) for prompt, kind in zip(prompts, kinds, strict=True)]
    assert [tokens == others for tokens, others in zip(plain, expected, strict=True)] == [False, False, False, True]
    fields = [SamplingParams(temperature=0, max_tokens=num_new, **kind) for kind in kinds]
    submission = make_submission(prompts, fields, model=small_model.MODEL, config=config)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def served(params, submission):
        state, _ = submit(init_state(small_model.MODEL, config), submission, model=small_model.MODEL, config=config)
        return run(params, state, model=small_model.MODEL, config=config, max_new_tokens=num_new)[1].token_ids

    assert served(small_model.make_params(), submission)[: len(prompts)].tolist() == expected
