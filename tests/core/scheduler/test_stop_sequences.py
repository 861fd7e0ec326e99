"""The rules that end a sequence on the device, in their order: stop tokens, stop sequences, length; minimum length."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import EngineConfig, ModelConfig
from jaxserve.core.scheduler import EngineState, Status, init_state, transitions
from tests import workload
from tests.workload import Asked, assert_same, greedy

NUM = 64
MODEL = ModelConfig("llama", 4, 2, 2, 1, 1, 1, 2)  # four tokens: sequences match often
CONFIG = EngineConfig(
    max_slots=NUM,
    num_pages=2,
    page_size=8,
    max_model_len=16,
    max_queue=NUM,
    max_stop_token_ids=2,
    max_stop_sequences=3,
    max_stop_sequence_len=4,
    kv_dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A sequence, the token it draws next, and what may end it."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    token: int
    stop: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 99

    @property
    def expected(self) -> Status:
        """Returns the status of the row after the token."""
        generated = (*self.generated, self.token)
        if self.token in self.stop_token_ids:
            return Status.STOP
        if len(generated) >= self.min_tokens:
            for sequence in self.stop:
                if generated[-len(sequence) :] == sequence:
                    return Status.STOP
        full = len(generated) >= self.max_tokens or len(self.prompt) + len(generated) >= CONFIG.max_model_len
        return Status.LENGTH if full else Status.RUNNING


ADVANCE = jax.jit(transitions.advance)


def advanced(rows: Sequence[Row], advance=ADVANCE) -> list[Status]:
    """Status of rows after each has drawn its token. Row i is in another slot than i; what is stale matches everything."""
    rng = np.random.default_rng(0)
    state: EngineState = jax.device_get(init_state(MODEL, CONFIG))
    queue = jax.tree.map(np.array, state.queue)
    slot = rng.permutation(NUM).astype(np.int32)
    token = np.zeros(NUM, np.int32)
    for index, row in enumerate(rows):
        known = row.prompt + row.generated
        queue.tokens[index] = row.token
        queue.tokens[index, : len(known)] = known
        queue.prompt_length[index], queue.num_tokens[index] = len(row.prompt), len(known)
        queue.max_length[index] = min(len(row.prompt) + row.max_tokens, CONFIG.max_model_len)
        queue.stop_token_ids[index, : len(row.stop_token_ids)] = row.stop_token_ids
        for place, sequence in enumerate(row.stop):
            queue.stop_sequences[index, place, -len(sequence) :] = sequence
        queue.rules.min_tokens[index] = row.min_tokens
        queue.status[index] = Status.RUNNING
        token[slot[index]] = row.token
    row_id, num_computed = np.full(NUM, NUM, np.int32), np.zeros(NUM, np.int32)
    row_id[slot[: len(rows)]] = np.arange(len(rows))
    num_computed[slot[: len(rows)]] = queue.num_tokens[: len(rows)] - 1
    slots = state.slots.replace(row_id=row_id, num_computed=num_computed)
    num_new = (row_id < NUM).astype(np.int32)
    after = advance(jax.device_put(state.replace(queue=queue, slots=slots)), num_new, token)
    return [Status(value) for value in after.queue.status[: len(rows)].tolist()]


def random_row(rng: np.random.Generator) -> Row:
    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, MODEL.vocab_size, rng.integers(low, high + 1)).tolist())

    prompt, generated, token = tokens(1, 6), tokens(0, 8), int(rng.integers(MODEL.vocab_size))
    history = (*prompt, *generated, token)

    def sequence() -> tuple[int, ...]:
        """Often what the sequence ends with, across the prompt's end if need be."""
        return history[-int(rng.integers(1, 5)) :] if rng.random() < 0.3 else tokens(1, 4)

    return Row(
        prompt,
        generated,
        token,
        stop=tuple(sequence() for _ in range(rng.integers(0, 4))),
        stop_token_ids=tokens(0, 2) if rng.random() < 0.2 else (),
        min_tokens=int(rng.integers(0, 10)) if rng.random() < 0.4 else 0,
        max_tokens=max(len(generated) + 1, int(rng.integers(1, 12))),
    )


def assert_as_expected(advance=ADVANCE, num_rounds: int = 60) -> list[Status]:
    rng, seen = np.random.default_rng(1), []
    for _ in range(num_rounds):
        rows = [random_row(rng) for _ in range(NUM)]
        actual = advanced(rows, advance)
        for row, status in zip(rows, actual, strict=True):
            assert status == row.expected, row
        seen += actual
    return seen


def test_random_sequences_end_as_the_documentation_says():
    seen = assert_as_expected()
    assert min(seen.count(status) for status in (Status.STOP, Status.LENGTH, Status.RUNNING)) > 300


def into_the_prompt(queue, tokens, row, num_tokens):
    return ENDS(queue.replace(prompt_length=jnp.zeros_like(queue.prompt_length)), tokens, row, num_tokens)


def before_the_minimum(queue, tokens, row, num_tokens):
    none = queue.rules.replace(min_tokens=jnp.zeros_like(queue.rules.min_tokens))
    return ENDS(queue.replace(rules=none), tokens, row, num_tokens)


def one_token_short(queue, tokens, row, num_tokens):
    return ENDS(queue.replace(stop_sequences=queue.stop_sequences.at[:, :, 2].set(-1)), tokens, row, num_tokens)


ENDS = transitions._ends_sequence


@pytest.mark.parametrize("mutant", [into_the_prompt, before_the_minimum, one_token_short])
def test_the_test_above_notices_a_wrong_ending(monkeypatch, mutant):
    monkeypatch.setattr(transitions, "_ends_sequence", mutant)
    with pytest.raises(AssertionError):
        assert_as_expected(jax.jit(lambda *args: transitions.advance(*args)), num_rounds=5)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Row((1,), (2,), 3, stop=((2, 3),)), Status.STOP),
        (Row((1,), (2, 3), 0, stop=((2, 3),)), Status.RUNNING),  # at the end only
        (Row((1, 2), (), 3, stop=((2, 3),)), Status.RUNNING),  # not across the prompt's end
        (Row((1, 2, 3), (1,), 2, stop=((2, 3), (1, 2))), Status.STOP),
        (Row((1,), (0, 1, 2), 3, stop=((0, 1, 2, 3),)), Status.STOP),  # as long as they may be
        (Row((0,), (1, 2), 3, stop=((0, 1, 2, 3),)), Status.RUNNING),
        (Row((1,), (), 0, stop=((0,),)), Status.STOP),  # token 0 is no padding
        (Row((1,), (2,), 3, stop=((2, 3),), min_tokens=2), Status.STOP),
        (Row((1,), (2,), 3, stop=((2, 3),), min_tokens=3), Status.RUNNING),
        (Row((1,), (2,), 3, stop=((2, 3),), min_tokens=3, max_tokens=2), Status.LENGTH),
        (Row((1,), (2,), 3, stop=((2, 3),), max_tokens=2), Status.STOP),  # before length
        (Row((1,), (2,), 3, stop_token_ids=(3,), max_tokens=2), Status.STOP),
        (Row((1,), (2,), 3, max_tokens=2), Status.LENGTH),
        (Row((1,) * 14, (2,), 3), Status.LENGTH),  # the longest sequence
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(row, status):
    assert advanced([row]) == [row.expected] == [status]


def test_without_room_for_stop_sequences_stop_tokens_and_length_still_end_a_sequence():
    config = dataclasses.replace(CONFIG, max_stop_sequences=0)
    queue = init_state(MODEL, config).queue
    row = jnp.arange(NUM, dtype=jnp.int32)
    assert not transitions._ends_sequence(queue, queue.tokens, row, queue.num_tokens).any()


# In whole steps.


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return workload.make_params()


def test_a_stop_sequence_ends_its_request_where_it_is_complete_and_no_neighbour(params):
    asked = workload.crowd(2, 4, plain=True)
    before = workload.trace(asked, params, workload.CONFIG)
    tokens = before[0].tokens
    place = next(
        i for i in range(4, len(tokens)) if tokens[i - 2 : i + 1] not in (tokens[j : j + 3] for j in range(i - 2))
    )
    stop = [tokens[place - 2 : place + 1], [*tokens[place - 2 : place], tokens[place] ^ 1]]
    changed = dataclasses.replace(asked[0], params=asked[0].params.override({"stop": stop}))
    after = workload.trace([changed, *asked[1:]], params, workload.CONFIG)
    assert after[0].tokens == tokens[: place + 1] and after[0].status == Status.STOP
    for seen, expected in zip(after[1:], before[1:], strict=True):
        assert_same(seen, expected)


def test_stop_tokens_are_not_drawn_before_the_minimum_and_end_the_sequence_after_it(params):
    prompt = workload.make_prompt(np.random.default_rng(5), 12)
    (plain,) = workload.trace([Asked(prompt, greedy())], params, workload.CONFIG)
    stops = list(dict.fromkeys(plain.tokens))[:6]
    fields = {"stop_token_ids": stops, "logprobs_mode": "processed"}
    (early,) = workload.trace([Asked(prompt, greedy(**fields))], params, workload.CONFIG)
    assert early.tokens == plain.tokens[:1] and early.status == Status.STOP
    (late,) = workload.trace([Asked(prompt, greedy(**fields, min_tokens=7))], params, workload.CONFIG)
    assert len(late.tokens) > 7 and not set(late.tokens[:7]) & set(stops)
    assert not set(np.concatenate(late.top_ids[:7]).tolist()) & set(stops)  # they have no probability
    (never,) = workload.trace([Asked(prompt, greedy(**fields, min_tokens=20))], params, workload.CONFIG)
    assert never.status == Status.LENGTH and never.tokens[: len(late.tokens) - 1] == late.tokens[:-1]
