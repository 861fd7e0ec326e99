"""The promises of the sampler with rules on the logits, as test functions; see `sampling_suite`."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.core.logit_rules import Context, LogitRules, plain_rules
from jaxserve.core.sampling import Sampled, SamplingArrays, sample
from tests.core import sampling_cases
from tests.core.sampling_cases import Case, Support, softmax, support_of
from tests.core.sampling_suite import K, assert_rows_equal, chi_square, random_limits

# From here on with rules. 2,500 requests, each with 40 rows of logits and limits: 100,000 rows.
VOCAB = 24


NUM_CASES, NUM_REPEATS = 2500, 40


RULED = jax.jit(functools.partial(sample, max_logprobs=K))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows with rules, and the results of the oracle for their logits."""

    logits: np.ndarray
    arrays: SamplingArrays
    rules: LogitRules
    context: Context
    changed: np.ndarray  # logits after the rules, float64

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.arrays, self.rules, self.context

    @property
    def possible(self) -> np.ndarray:
        """Whether each row has a token that may be drawn."""
        return np.isfinite(self.changed).any(axis=1)

    @functools.cached_property
    def support(self) -> Support:
        """The support of each row: for greedy rows at temperature 1, for rows without a possible token all tokens."""
        sure = np.where(self.possible[:, None], self.changed, 0)
        temperature = np.where(self.arrays.temperature > 0, self.arrays.temperature, np.float32(1))
        return support_of(sure, self.arrays.replace(temperature=temperature))


def make_batch(seed: int, num_cases: int, num_repeats: int) -> Batch:
    rng = np.random.default_rng(seed)
    cases = [
        sampling_cases.random_case(rng, VOCAB, *sampling_cases.random_rules(rng), exact=True) for _ in range(num_cases)
    ]
    _, rules, context = sampling_cases.arrays_of(cases, VOCAB)
    of_case = np.tile(np.arange(num_cases), num_repeats)
    seen = context.seen
    rules, context = jax.tree.map(lambda leaf: leaf[of_case], (rules, context.replace(seen=None)))
    number = len(of_case)
    arrays = random_limits(rng, number, VOCAB).replace(
        num_logprobs=np.where(rng.random(number) < 0.8, K, -1).astype(np.int32), processed=rng.random(number) < 0.5
    )
    greedy = rng.random(number) < 0.3
    arrays = arrays.replace(temperature=np.where(greedy, np.float32(0), arrays.temperature))
    logits = sampling_cases.grid(rng, number, VOCAB)
    changed = np.stack([sampling_cases.ruled(row, cases[case]) for row, case in zip(logits, of_case, strict=True)])
    return Batch(logits, arrays, rules, context.replace(seen=seen), changed)


@functools.cache
def big_batch() -> Batch:
    return make_batch(20, NUM_CASES, NUM_REPEATS)


@functools.cache
def drawn_of_big_batch() -> Sampled:
    batch = big_batch()
    return jax.device_get(RULED(*batch.arguments, np.ones(len(batch.logits), bool)))


def assert_rows_follow_the_oracle(drawn: Sampled, batch: Batch) -> None:
    """Checks which rows fail, which token greedy rows get, and that random rows stay within their support."""
    row = np.arange(len(batch.logits))
    np.testing.assert_array_equal(drawn.failed, ~batch.possible)
    greedy, support = batch.possible & (batch.arrays.temperature == 0), batch.support
    random = batch.possible & ~greedy
    np.testing.assert_array_equal(drawn.token[greedy], np.argmax(batch.changed, axis=1)[greedy])
    assert np.all(support.widest[row, drawn.token][random])
    assert np.all(support.kept[row, drawn.token][random & ~support.ambiguous])


def test_with_rules_in_any_combination_nothing_outside_the_support_is_drawn():
    batch = big_batch()
    assert len(batch.logits) == 100_000
    assert_rows_follow_the_oracle(drawn_of_big_batch(), batch)
    assert (~batch.possible).sum() > 50  # every token ruled out
    assert (batch.possible & (batch.support.kept.sum(axis=1) == 1)).sum() > 10_000
    assert (batch.changed != batch.logits).any(axis=1).mean() > 0.7
    assert batch.support.ambiguous.mean() < 0.02


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logprobs_are_of_the_raw_distribution_or_of_the_one_drawn_from(mode):
    batch, drawn = big_batch(), drawn_of_big_batch()
    asked = batch.possible & (batch.arrays.num_logprobs >= 0) & (batch.arrays.processed == (mode == "processed"))
    logits = batch.logits.astype(np.float64)
    if mode == "processed":
        logits = np.where(batch.possible[:, None], batch.changed, 0)
        random = batch.arrays.temperature > 0
        temperature = np.where(random, batch.arrays.temperature, np.float32(1))[:, None]
        scaled = (logits.astype(np.float32) / temperature).astype(np.float64)
        logits = np.where(batch.support.kept | ~random[:, None], scaled, -np.inf)
        asked &= ~(batch.support.ambiguous & random)
    row = np.arange(len(logits))
    with np.errstate(divide="ignore"):
        logprobs = np.log(softmax(logits))
    asked &= ~np.any((logprobs > -np.inf) & (logprobs < -60), axis=1)  # these may underflow
    order = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    top_logprobs = np.take_along_axis(logprobs, order, 1)
    there = top_logprobs > -np.inf
    assert asked.sum() > 10_000
    assert np.all(there[asked]) == (mode == "raw")  # processed: tokens of probability 0 are left out
    np.testing.assert_array_equal(drawn.top_ids[asked], np.where(there, order, -1)[asked])
    np.testing.assert_allclose(drawn.top_logprobs[asked], np.where(there, top_logprobs, 0)[asked], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(drawn.logprob[asked], logprobs[row, drawn.token][asked], rtol=1e-5, atol=2e-5)
    rank = 1 + (logits > logits[row, drawn.token][:, None]).sum(axis=1)
    np.testing.assert_array_equal(drawn.rank[asked], rank[asked])


def test_rows_with_rules_that_ask_for_no_logprobs_get_the_raw_one_of_their_token():
    batch, drawn = big_batch(), drawn_of_big_batch()
    silent = batch.possible & (batch.arrays.num_logprobs < 0)
    raw = np.log(softmax(batch.logits.astype(np.float64)))[np.arange(len(batch.logits)), drawn.token]
    np.testing.assert_allclose(drawn.logprob[silent], raw[silent], rtol=1e-5, atol=2e-5)
    assert np.all(drawn.rank[silent] == 0) and np.all(drawn.top_ids[silent] == -1)


@pytest.mark.parametrize("limits", [{}, {"temperature": 1.2, "top_k": 12, "top_p": 0.97, "min_p": 0.01}])
def test_draws_follow_the_distribution_that_rules_leave(limits):
    params = SamplingParams(
        allowed_token_ids=range(5, 24),
        bad_words=[[9, 7], [8]],
        min_tokens=4,
        stop_token_ids=[20],
        logit_bias={6: 1.5, 21: -2, 2: 9},
        repetition_penalty=1.4,
        frequency_penalty=0.3,
        presence_penalty=-0.6,
        seed=5,
        **limits,
    )
    case = Case(params, (12, 13, 6, 13), (14, 15, 9))
    logits = np.random.default_rng(13).standard_normal((1, VOCAB)).astype(np.float32)
    arrays, rules, context = sampling_cases.arrays_of([case], VOCAB)
    probs = support_of(sampling_cases.ruled(logits[0], case)[None], arrays).probs[0]
    assert 6 < (probs > 0).sum() <= (12 if limits else 17)
    number = NUM_CASES * NUM_REPEATS  # the shape of the program above
    logits, arrays, rules, context = jax.tree.map(
        lambda leaf: np.repeat(leaf, number, axis=0), (logits, arrays, rules, context)
    )
    arrays = arrays.replace(sample_index=np.arange(number, dtype=np.int32))
    context = context.replace(seen=context.seen[:NUM_CASES])
    token = np.asarray(RULED(logits, arrays, rules, context, np.ones(number, bool)).token)
    assert np.all(probs[token] > 0)
    assert chi_square(token, probs) > 1e-6


def take(batch: tuple[Any, ...], order: np.ndarray) -> tuple[Any, ...]:
    """Returns the rows in another order; their slots stay the same."""
    logits, arrays, rules, context = batch
    moved = jax.tree.map(lambda leaf: leaf[order], (logits, arrays, rules, context.replace(seen=None)))
    return *moved[:3], moved[3].replace(seen=context.seen)


def sixty_four(*cases: Case) -> tuple[Any, ...]:
    """Returns arguments of `sample` for these cases, filled up to 64 with cases that have rules of all kinds."""
    rng = np.random.default_rng(21)
    more = [
        sampling_cases.random_case(rng, VOCAB, *sampling_cases.random_rules(rng), exact=True)
        for _ in range(64 - len(cases))
    ]
    logits = sampling_cases.grid(rng, 64, VOCAB)
    return logits, *sampling_cases.arrays_of([*cases, *more], VOCAB)


def run_sixty_four(arguments: tuple[Any, ...], active: np.ndarray | None = None) -> Sampled:
    return jax.device_get(RULED(*arguments, np.ones(64, bool) if active is None else active))


IMPOSSIBLE = SamplingParams(allowed_token_ids=[5, 6], bad_words=[[5], [6]], logprobs=2)


def test_a_row_gives_the_same_whatever_rules_its_neighbours_have():
    logits, arrays, rules, context = sixty_four(Case(IMPOSSIBLE, (1, 2), ()))
    rng = np.random.default_rng(0)
    arrays = random_limits(rng, 64, VOCAB).replace(
        num_logprobs=rng.integers(-1, K + 1, 64).astype(np.int32), processed=rng.random(64) < 0.5
    )
    none = jax.device_get(plain_rules(64, VOCAB, sampling_cases.CONFIG))
    others = jax.tree.map(lambda leaf: np.roll(leaf, 7, axis=0), rules)

    def run(rules: LogitRules, active: np.ndarray | None = None) -> Sampled:
        return run_sixty_four((logits, arrays, rules, context), active)

    def mixed(is_target: np.ndarray, rules: LogitRules, others: LogitRules) -> LogitRules:
        """Returns `rules` in the rows where `is_target`, and `others` in the rest."""
        return jax.tree.map(lambda a, b: np.where(is_target[(...,) + (None,) * (a.ndim - 1)], a, b), rules, others)

    expected, without = run(rules), run(none)
    assert expected.failed[0] and not expected.failed.all() and not without.failed.any()
    assert (expected.token != without.token).sum() > 20
    order = rng.permutation(64)
    moved = run_sixty_four(take((logits, arrays, rules, context), order))
    assert_rows_equal(moved, jax.tree.map(lambda leaf: leaf[order], expected), np.arange(64))
    for is_target in (np.arange(64) % 2 == 0, np.arange(64) % 5 == 1, np.arange(64) == 9):
        which = np.flatnonzero(is_target)
        assert_rows_equal(run(mixed(is_target, rules, none)), expected, which)
        assert_rows_equal(run(mixed(is_target, none, rules)), without, which)
        assert_rows_equal(run(mixed(is_target, rules, others)), expected, which)
        assert_rows_equal(run(rules, is_target), expected, which)  # the others inactive


def test_a_row_with_every_token_ruled_out_fails_and_its_neighbours_do_not():
    fine = dataclasses.replace(IMPOSSIBLE, bad_words=[[5]])
    cases = [Case(params, (1, 2), ()) for params in (fine, IMPOSSIBLE, SamplingParams(temperature=0))]
    logits, *others = sixty_four(*cases)
    drawn = run_sixty_four((logits, *others))
    assert drawn.failed[:3].tolist() == [False, True, False]
    assert drawn.token[[0, 2]].tolist() == [6, np.argmax(logits[2])]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_row_also_where_rules_hide_them(value):
    hiding = SamplingParams(allowed_token_ids=[5, 6], temperature=0.0)
    logits, *others = sixty_four(
        *(Case(params, (1,), ()) for params in (hiding, SamplingParams(temperature=0), hiding))
    )
    logits[:2, 9] = value
    assert run_sixty_four((logits, *others)).failed[:3].tolist() == [True, True, False]


CHANGED = jax.jit(
    lambda logits, arrays, rules, context, changed: sample(
        logits, arrays, rules, context, np.ones(len(logits), bool), max_logprobs=K, changed=changed
    )
)


def test_what_a_users_function_made_of_the_logits_is_drawn_from_before_the_temperature():
    batch = make_batch(23, 64, 4)
    changed = np.where(batch.changed > -np.inf, np.square(np.maximum(batch.changed, -1e6)) / 8, -np.inf)
    batch.changed[0], changed[1] = -np.inf, -np.inf
    changed_batch = dataclasses.replace(batch, changed=changed)
    drawn = jax.device_get(CHANGED(*batch.arguments, changed.astype(np.float32)))
    assert_rows_follow_the_oracle(drawn, changed_batch)  # of the rules nothing more is seen
    with pytest.raises(AssertionError):
        assert_rows_follow_the_oracle(drawn, batch)
    raw, row = changed_batch.possible & ~batch.arrays.processed, np.arange(len(changed))
    expected = np.log(softmax(batch.logits.astype(np.float64)))[row, drawn.token]
    np.testing.assert_allclose(drawn.logprob[raw], expected[raw], rtol=1e-5, atol=2e-5)
    greedy = changed_batch.possible & batch.arrays.processed & (batch.arrays.temperature == 0)
    greedy &= batch.arrays.num_logprobs >= 0
    expected = np.log(softmax(np.where(changed_batch.possible[:, None], changed, 0)).max(axis=1))
    np.testing.assert_allclose(drawn.logprob[greedy], expected[greedy], rtol=1e-5, atol=2e-5)
    assert raw.any() and greedy.any()
