"""The sampler against a float64 oracle that sorts, without and with rules on the logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax

from jaxserve import EngineConfig, SamplingParams
from jaxserve.core import logit_rules, sampling, vocab_search
from jaxserve.core.logit_rules import Context, LogitRules, plain_rules
from jaxserve.core.sampling import Sampled, SamplingArrays, greedy_arrays, sample
from tests.core import sampling_cases
from tests.core.sampling_cases import Case, Support, softmax, support_of

K = 5  # max_logprobs
CONFIG = EngineConfig(max_slots=1, max_model_len=8)


def context_of(position: jax.Array) -> Context:
    """Of rows about which only the position of the token to draw is known."""
    number = position.shape[0]
    nothing = jnp.zeros((number, 1), jnp.int32)
    return Context(
        tokens=nothing,
        num_tokens=position,
        prompt_length=position,
        stop_token_ids=nothing - 1,
        slot=jnp.arange(number, dtype=jnp.int32),
        seen=None,
    )


def sample_plainly(logits, rows, position, active, *, max_logprobs: int) -> Sampled:
    """`sample` without rules."""
    rules = plain_rules(logits.shape[0], logits.shape[1], CONFIG)
    return sample(logits, rows, rules, context_of(position), active, max_logprobs=max_logprobs)


SAMPLE = jax.jit(functools.partial(sample_plainly, max_logprobs=K))


def rows(number: int, **values: Any) -> SamplingArrays:
    """Rows that sample from the whole distribution with a key of 1, with some fields changed; scalars are repeated."""
    plain = jax.device_get(greedy_arrays(number)).replace(temperature=np.ones(number, np.float32))
    plain = plain.replace(key_data=np.ones((number, 2), np.uint32))
    changes = {}
    for name, value in values.items():
        old = getattr(plain, name)
        changes[name] = np.broadcast_to(np.asarray(value, old.dtype), old.shape)
    return plain.replace(**changes)


def draw(logits: Any, wanted: SamplingArrays, position: Any = 0, active: Any = True) -> Sampled:
    """`sample`; a single row of logits, or position, serves all rows.

    Few rows are filled up with inactive ones, so that they share a program.
    """
    number = wanted.temperature.shape[0]
    logits = np.broadcast_to(np.asarray(logits, np.float32), (number, np.shape(logits)[-1]))
    position = np.broadcast_to(np.asarray(position, np.int32), (number,))
    padded = np.minimum(np.arange(max(number, 512)), number - 1)
    active = np.broadcast_to(active, (number,))[padded] & (np.arange(len(padded)) < number)
    logits, wanted, position = jax.tree.map(lambda leaf: leaf[padded], (logits, wanted, position))
    drawn = jax.device_get(SAMPLE(logits, wanted, position, active))
    return jax.tree.map(lambda leaf: leaf[:number], drawn)


def random_limits(rng: np.random.Generator, number: int, vocab_size: int) -> SamplingArrays:
    """Sampling parameters from one end of their ranges to the other."""
    some_p = rng.choice([1.0, 0.999, 0.9, 0.5, 0.1, 1e-3, 1e-6], number)
    return rows(
        number,
        temperature=rng.choice([0.1, 0.7, 1.0, 2.0], number),
        top_k=rng.choice([0, 1, 2, 7, 20, vocab_size - 1, vocab_size, vocab_size + 3, 2**31 - 1], number),
        top_p=np.where(rng.random(number) < 0.5, some_p, 1 - rng.random(number)),
        min_p=rng.choice([0.0, 0.0, 0.0, 0.003, 0.1, 0.5, 1.0], number),
        key_data=rng.integers(0, 2**32, (number, 2)),
    )


def random_logits(rng: np.random.Generator, number: int, vocab_size: int) -> np.ndarray:
    """Rows with and without ties and banned tokens; of some only one token is left."""
    logits = rng.standard_normal((number, vocab_size)) * rng.choice([0.1, 1.0, 4.0], (number, 1))
    logits = np.where(rng.random((number, 1)) < 0.4, np.round(logits * 2) / 2, logits)
    sparse = rng.random((number, 1)) < 0.3
    logits = np.where(sparse & (rng.random(logits.shape) < rng.random((number, 1))), -np.inf, logits)
    single = rng.random(number) < 0.05
    logits[single] = -np.inf
    logits[np.arange(number), rng.integers(0, vocab_size, number)] = rng.standard_normal(number)
    return logits.astype(np.float32)


@functools.cache
def random_rows(seed: int, number: int, vocab_size: int) -> tuple[np.ndarray, SamplingArrays, Support]:
    """Logits, parameters, and what the oracle makes of them."""
    rng = np.random.default_rng(seed)
    logits, wanted = random_logits(rng, number, vocab_size), random_limits(rng, number, vocab_size)
    return logits, wanted, support_of(logits, wanted)


# 100,000 rows in all; the draw has one block of 128 tokens, two, or eight.
BATCHES = pytest.mark.parametrize(
    ("seed", "number", "vocab_size"), [(0, 80_000, 24), (1, 18_000, 130), (2, 2_000, 1000)]
)


@BATCHES
def test_the_kept_tokens_and_their_weights_are_the_oracles(seed, number, vocab_size):
    assert_weights_agree(jax.jit(sampling._weights), *random_rows(seed, number, vocab_size))


def assert_weights_agree(program: Callable[..., Any], logits: np.ndarray, wanted: SamplingArrays, support: Support):
    """Rows whose thresholds rounding could move aside, of which there are few."""
    weights = np.asarray(program(logits, wanted, np.ones(len(logits), bool)), np.float64)
    certain, probs = ~support.ambiguous, support.probs
    assert certain.mean() > 0.98
    decidable = (probs > 1e-30 * probs.max(axis=1, keepdims=True)) | (probs == 0)  # others may underflow
    assert np.array_equal(((weights > 0) & decidable)[certain], (support.kept & decidable)[certain])
    assert not np.any((weights > 0) & ~support.widest)
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights[certain], probs[certain], rtol=1e-5, atol=1e-7)


def test_the_weights_test_notices_that_ties_at_the_top_p_boundary_are_kept(monkeypatch):
    monkeypatch.setattr(sampling, "drop_ties", lambda weights, tied, excess: weights)
    with pytest.raises(AssertionError):
        assert_weights_agree(jax.jit(lambda *args: sampling._weights(*args)), *random_rows(4, 1000, 24))


@BATCHES
def test_nothing_outside_the_support_is_ever_drawn(seed, number, vocab_size):
    logits, wanted, support = random_rows(seed, number, vocab_size)
    drawn = np.zeros_like(support.kept)
    for position in range(5):
        drawn[np.arange(number), draw(logits, wanted, position).token] = True
    certain = ~support.ambiguous
    assert not np.any(drawn & ~support.widest)
    assert not np.any((drawn & ~support.kept)[certain])
    assert np.all((drawn.sum(axis=1) == 1) | (support.kept.sum(axis=1) > 1) | ~certain)
    assert (drawn.sum(axis=1) > 1).mean() > 0.3  # it does draw at random
    assert (support.kept.sum(axis=1) == 1).mean() > 0.05  # and of some rows one token only is left


DRAWS = 50_000
SETTINGS = [
    {},
    {"temperature": 0.6, "top_k": 12},
    {"temperature": 1.5, "top_p": 0.85},
    {"min_p": 0.05},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "plain")
def test_fifty_thousand_draws_follow_the_distribution(settings):
    rng = np.random.default_rng(11)
    logits = (1.5 * rng.standard_normal(300)).astype(np.float32)
    token = draw(logits, rows(DRAWS, **settings), np.arange(DRAWS)).token
    assert chi_square(token, support_of(logits[None], rows(1, **settings)).probs[0]) > 1e-6


@pytest.mark.parametrize("field", ["sample_index", "key_data"])
def test_draws_of_different_samples_and_seeds_follow_the_distribution(field):
    rng = np.random.default_rng(12)
    logits = (1.5 * rng.standard_normal(300)).astype(np.float32)
    number = np.arange(DRAWS)
    value = number if field == "sample_index" else np.stack([0 * number, number], axis=1)
    token = draw(logits, rows(DRAWS, **{field: value})).token
    assert chi_square(token, softmax(logits.astype(np.float64))) > 1e-6


def test_the_chi_square_test_notices_a_slightly_wrong_distribution():
    logits = (1.5 * np.random.default_rng(11).standard_normal(300)).astype(np.float32)
    token = draw(logits, rows(DRAWS, temperature=1.05), np.arange(DRAWS)).token
    assert chi_square(token, softmax(logits.astype(np.float64))) < 1e-6


def chi_square(token: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the counts; tokens expected fewer than ten times are counted as one."""
    counts, expected = np.bincount(token, minlength=len(probs)), probs * len(token)
    rare = expected < 10
    observed = [*counts[~rare], counts[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    if wanted[-1] == 0:
        assert observed[-1] == 0
        observed, wanted = observed[:-1], wanted[:-1]
    return float(scipy.stats.chisquare(observed, wanted).pvalue)


def tokens_drawn(logits: list[float], **settings: Any) -> set[int]:
    """All tokens among 512 draws. The vocabulary is filled up to eight with impossible ones: one program for all."""
    padded = [*logits, *[-np.inf] * (8 - len(logits))]
    return set(draw(padded, rows(512, **settings), np.arange(512)).token.tolist())


def test_ties_with_the_kth_logit_are_kept():
    assert tokens_drawn([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], top_k=2) == {1, 2, 3, 5}
    assert tokens_drawn([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], top_k=1) == {1}
    assert tokens_drawn([0.0, -0.0, -1.0, -0.0], top_k=1) == {0, 1, 3}


def test_ties_at_the_top_p_boundary_are_dropped_lowest_index_first():
    assert tokens_drawn([0.0] * 8, top_p=0.75) == {2, 3, 4, 5, 6, 7}  # 2/8 <= 1 - 0.75 are dropped
    assert tokens_drawn([0.0] * 8, top_p=0.5) == {4, 5, 6, 7}
    assert tokens_drawn([0.0] * 8, top_p=0.49) == {4, 5, 6, 7}
    assert tokens_drawn([0.0] * 8, top_p=0.51) == {3, 4, 5, 6, 7}
    assert tokens_drawn([0.0] * 8, top_p=1e-6) == {7}
    assert tokens_drawn([0.0] * 8, top_p=1e-12) == {7}  # 1 - top_p is 1
    assert tokens_drawn([0.0, -np.inf, 0.0, -np.inf, 0.0, 0.0], top_p=0.5) == {4, 5}


def test_top_p_counts_the_mass_that_min_p_and_top_k_have_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert tokens_drawn(logits, top_p=0.75) == {0, 1, 2}
    assert tokens_drawn(logits, top_p=0.5) == {0, 1}
    assert tokens_drawn(logits, top_p=0.5, top_k=2) == {0}  # 3/7 of what is left lies below
    assert tokens_drawn(logits, top_p=0.5, min_p=0.6) == {0}
    assert tokens_drawn(logits, top_p=0.65, top_k=2) == {0, 1}


def test_min_p_looks_at_the_distribution_after_temperature():
    logits = np.log([0.6, 0.3, 0.1]).tolist()
    assert tokens_drawn(logits, min_p=0.4) == {0, 1}
    assert tokens_drawn(logits, min_p=0.4, temperature=0.5) == {0}  # 0.36 : 0.09 : 0.01
    assert tokens_drawn([1.0, 2.0, 2.0], min_p=1.0) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 9.9e-6])
def test_greedy_takes_the_lowest_id_of_the_most_likely_whatever_else_is_set(temperature):
    logits = [0.0, 2.0, 2.0, 1.0, 2.0]
    assert tokens_drawn(logits, temperature=temperature) == {1}
    assert tokens_drawn(logits, temperature=temperature, top_p=0.1, top_k=1, min_p=1.0) == {1}


def test_from_a_temperature_of_1e_5_on_ties_are_drawn_at_random():
    assert tokens_drawn([0.0, 2.0, 2.0, 1.0, 2.0], temperature=1e-5) == {1, 2, 4}


def test_logprobs_ranks_and_top_lists_are_those_of_the_raw_distribution():
    rng = np.random.default_rng(3)
    logits = np.round(3 * rng.standard_normal((400, 60)), 1).astype(np.float32)  # rounded: with ties
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    wanted = rows(
        400,
        num_logprobs=rng.integers(0, K + 1, 400),
        temperature=rng.choice([0.0, 0.5, 1.5], 400),
        top_p=rng.choice([1.0, 0.5], 400),
        top_k=rng.choice([0, 10], 400),
    )
    drawn = draw(logits, wanted)
    for row, values in enumerate(logits):
        exact = values.astype(np.float64)
        logprobs = exact - (np.log(np.exp(exact - exact.max()).sum()) + exact.max())
        order = np.argsort(-values, kind="stable")[:K]
        token = drawn.token[row]
        np.testing.assert_allclose(drawn.logprob[row], logprobs[token], atol=2e-6)
        np.testing.assert_array_equal(drawn.top_ids[row], order)
        np.testing.assert_allclose(drawn.top_logprobs[row], logprobs[order], atol=2e-6)
        assert drawn.rank[row] == 1 + np.sum(values > values[token])


def test_the_logprob_of_a_token_is_the_same_number_in_the_top_list():
    logits = np.random.default_rng(4).standard_normal((200, 60)).astype(np.float32)
    drawn = draw(logits, rows(200, temperature=0.0, num_logprobs=1))
    np.testing.assert_array_equal(drawn.top_ids[:, 0], drawn.token)
    np.testing.assert_array_equal(drawn.top_logprobs[:, 0], drawn.logprob)
    assert np.all(drawn.rank == 1)


def test_rows_that_ask_for_no_logprobs_get_none_beside_rows_that_do():
    logits = np.random.default_rng(5).standard_normal((4, 60)).astype(np.float32)
    drawn = draw(logits, rows(4, num_logprobs=[-1, 0, -1, 3]))
    assert drawn.top_ids.min(axis=1).tolist() == [-1, drawn.top_ids[1].min(), -1, drawn.top_ids[3].min()]
    assert drawn.rank[[0, 2]].tolist() == [0, 0]
    assert np.all(drawn.rank[[1, 3]] >= 1)
    assert np.all(drawn.top_logprobs[[0, 2]] == 0)
    assert np.all(drawn.logprob < 0)


def test_zeros_of_both_signs_are_ties_in_the_top_list_as_they_are_for_greedy_rows():
    logits = np.array([-1.0, -0.0, 0.0, -2.0, 0.0, -0.0], np.float32)
    padded = np.pad(logits, (0, 54), constant_values=-9)
    drawn = draw(padded, rows(4, temperature=0.0, num_logprobs=K))
    assert drawn.token.tolist() == [1] * 4
    assert drawn.top_ids[0].tolist() == [1, 2, 4, 5, 0]


@pytest.mark.parametrize("max_logprobs", [0, 7])
def test_top_lists_have_their_fixed_size_also_beyond_the_vocabulary(max_logprobs):
    logits = jnp.asarray([[1.0, 3.0, 2.0]], jnp.float32)
    wanted = rows(1, temperature=0.0, num_logprobs=max_logprobs)
    drawn = sample_plainly(logits, wanted, jnp.zeros(1, jnp.int32), jnp.ones(1, bool), max_logprobs=max_logprobs)
    assert drawn.top_ids.tolist() == [[1, 2, 0, -1, -1, -1, -1][:max_logprobs]]
    assert drawn.top_logprobs.shape == (1, max_logprobs)


@pytest.mark.parametrize("piece", [1, 3, 16])
def test_the_largest_are_found_in_pieces_as_at_once_ties_and_banned_tokens_included(piece):
    logits = np.random.default_rng(0).integers(0, 9, (50, 40)).astype(np.float32)  # many ties
    logits[:20] = np.where(logits[:20] < 7, -np.inf, logits[:20])  # fewer left than are asked for
    values, ids = lax.top_k(jnp.asarray(logits), 20)
    in_pieces = vocab_search.top(20, piece)(jnp.asarray(logits))
    np.testing.assert_array_equal(in_pieces[1], ids)
    np.testing.assert_array_equal(in_pieces[0], values)


def test_a_row_gives_the_same_in_any_place_and_beside_any_neighbours():
    logits, wanted, _ = random_rows(6, 64, 300)
    rng = np.random.default_rng(6)
    wanted = wanted.replace(num_logprobs=rng.integers(-1, K + 1, 64).astype(np.int32))
    wanted = wanted.replace(sample_index=rng.integers(0, 9, 64).astype(np.int32))
    position = rng.integers(0, 2000, 64)
    expected = draw(logits, wanted, position)
    for order in (rng.permutation(64), rng.permutation(64)):
        moved = draw(logits[order], jax.tree.map(lambda leaf, order=order: leaf[order], wanted), position[order])
        assert_rows_equal(moved, jax.tree.map(lambda leaf, order=order: leaf[order], expected), np.arange(64))
    other_logits, others, _ = random_rows(7, 64, 300)
    for neighbours in (others, rows(64, temperature=0.0), rows(64, num_logprobs=2, top_p=0.5)):
        kept = np.arange(64) % 3 == 0
        mixed = jax.tree.map(
            lambda a, b, kept=kept: np.where(kept[(...,) + (None,) * (a.ndim - 1)], a, b), wanted, neighbours
        )
        drawn = draw(np.where(kept[:, None], logits, other_logits), mixed, np.where(kept, position, 5))
        assert_rows_equal(drawn, expected, np.flatnonzero(kept))


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0.1}])
def test_limits_bind_only_the_rows_that_set_them(limits):
    logits = np.random.default_rng(9).standard_normal(60)
    limited = np.arange(512) % 2 == 0
    ((name, value),) = limits.items()
    plain = rows(512)
    mixed = plain.replace(**{name: np.where(limited, value, getattr(plain, name)).astype(getattr(plain, name).dtype)})
    free, beside = draw(logits, plain, np.arange(512)), draw(logits, mixed, np.arange(512))
    assert_rows_equal(beside, free, np.flatnonzero(~limited))
    assert np.any(beside.token[limited] != free.token[limited])


def assert_rows_equal(drawn: Sampled, expected: Sampled, which: np.ndarray) -> None:
    for name in Sampled.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(drawn, name)[which], getattr(expected, name)[which], err_msg=name)


def test_inactive_rows_do_not_disturb_active_ones():
    logits, wanted, _ = random_rows(8, 64, 50)
    active = np.arange(64) % 2 == 0
    expected = draw(logits, wanted)
    broken = np.where(active[:, None], logits, np.nan).astype(np.float32)
    drawn = draw(broken, wanted, active=active)
    assert_rows_equal(drawn, expected, np.flatnonzero(active))


def coins(**values: Any) -> np.ndarray:
    """Ten thousand draws of two equally likely tokens, as -1 and 1."""
    position = values.pop("position", 0)
    return 2.0 * draw([0.0, 0.0], rows(10_000, **values), position).token - 1


def test_seeds_samples_and_positions_give_unrelated_streams():
    number = np.arange(10_000)
    streams = [coins(key_data=[0, seed], position=number) for seed in (0, 1, 2**32 - 1)]
    streams += [coins(key_data=[1, 0], position=number), coins(key_data=[0, 0], sample_index=1, position=number)]
    streams += [coins(key_data=[0, 0], sample_index=number), coins(key_data=[0, 0], position=number + 1)]
    streams += [coins(key_data=np.stack([0 * number, number], axis=1))]
    correlation = np.array(streams) @ np.array(streams).T / 10_000
    assert np.all(np.abs(correlation[~np.eye(len(streams), dtype=bool)]) < 0.05)  # five standard deviations
    assert np.all(np.abs(np.mean(streams, axis=1)) < 0.05)


def test_the_same_seed_sample_and_position_give_the_same_draw():
    np.testing.assert_array_equal(coins(position=np.arange(10_000)), coins(position=np.arange(10_000)))
    assert abs(coins(position=3, sample_index=2, key_data=[7, 8]).sum()) == 10_000


def test_a_token_of_one_in_a_million_has_its_share_of_all_uniform_numbers():
    """jax.random.uniform gives multiples of 2^-23; these are all of them around the place where the token lies."""
    first = round(0.25 / (1 + 1e-6) * 2**23)
    uniform = np.arange(first - 100, first + 100) / np.float32(2**23)
    weights = np.tile(np.float32([0.25, 1e-6, 0.75]), (200, 1))
    tokens = np.asarray(vocab_search.inverse(jnp.asarray(weights), jnp.asarray(uniform, jnp.float32)))
    counts = np.bincount(tokens)
    assert abs(counts[0] - 100) <= 1
    assert abs(counts[1] - 1e-6 * 2**23) <= 1
    assert np.all(np.diff(tokens) >= 0)


# From here on with rules. 2,500 requests, each with 40 rows of logits and limits: 100,000 rows.
VOCAB = 24
NUM_CASES, NUM_REPEATS = 2500, 40
RULED = jax.jit(functools.partial(sample, max_logprobs=K))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows with rules, and what the oracle makes of their logits."""

    logits: np.ndarray
    wanted: SamplingArrays
    rules: LogitRules
    context: Context
    changed: np.ndarray  # logits after the rules, float64

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.wanted, self.rules, self.context

    @property
    def possible(self) -> np.ndarray:
        """Rows with a token left."""
        return np.isfinite(self.changed).any(axis=1)

    @functools.cached_property
    def support(self) -> Support:
        """Of greedy rows: at temperature 1. Of rows with no token left: of any token."""
        sure = np.where(self.possible[:, None], self.changed, 0)
        temperature = np.where(self.wanted.temperature > 0, self.wanted.temperature, np.float32(1))
        return support_of(sure, self.wanted.replace(temperature=temperature))


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
    wanted = random_limits(rng, number, VOCAB).replace(
        num_logprobs=np.where(rng.random(number) < 0.8, K, -1).astype(np.int32), processed=rng.random(number) < 0.5
    )
    greedy = rng.random(number) < 0.3
    wanted = wanted.replace(temperature=np.where(greedy, np.float32(0), wanted.temperature))
    logits = sampling_cases.grid(rng, number, VOCAB)
    changed = np.stack([sampling_cases.ruled(row, cases[case]) for row, case in zip(logits, of_case, strict=True)])
    return Batch(logits, wanted, rules, context.replace(seen=seen), changed)


@functools.cache
def big_batch() -> Batch:
    return make_batch(20, NUM_CASES, NUM_REPEATS)


@functools.cache
def drawn_of_big_batch() -> Sampled:
    batch = big_batch()
    return jax.device_get(RULED(*batch.arguments, np.ones(len(batch.logits), bool)))


def assert_rows_follow_the_oracle(drawn: Sampled, batch: Batch) -> None:
    """Which rows fail, which token greedy rows get, and that random rows stay within their support."""
    row = np.arange(len(batch.logits))
    np.testing.assert_array_equal(drawn.failed, ~batch.possible)
    greedy, support = batch.possible & (batch.wanted.temperature == 0), batch.support
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


def test_the_test_above_notices_penalties_of_prompt_tokens(monkeypatch):
    penalise = logit_rules._penalise
    monkeypatch.setattr(
        logit_rules, "_penalise", lambda logits, rules, seen: penalise(logits, rules, seen + (seen & 1))
    )
    batch = make_batch(22, 60, 4)
    program = jax.jit(lambda *args: sample(*args, max_logprobs=0))
    with pytest.raises(AssertionError):
        assert_rows_follow_the_oracle(jax.device_get(program(*batch.arguments, np.ones(240, bool))), batch)


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logprobs_are_of_the_raw_distribution_or_of_the_one_drawn_from(mode):
    batch, drawn = big_batch(), drawn_of_big_batch()
    asked = batch.possible & (batch.wanted.num_logprobs >= 0) & (batch.wanted.processed == (mode == "processed"))
    logits = batch.logits.astype(np.float64)
    if mode == "processed":
        logits = np.where(batch.possible[:, None], batch.changed, 0)
        random = batch.wanted.temperature > 0
        temperature = np.where(random, batch.wanted.temperature, np.float32(1))[:, None]
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
    silent = batch.possible & (batch.wanted.num_logprobs < 0)
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
    wanted, rules, context = sampling_cases.arrays_of([case], VOCAB)
    probs = support_of(sampling_cases.ruled(logits[0], case)[None], wanted).probs[0]
    assert 6 < (probs > 0).sum() <= (12 if limits else 17)
    number = NUM_CASES * NUM_REPEATS  # the shape of the program above
    logits, wanted, rules, context = jax.tree.map(
        lambda leaf: np.repeat(leaf, number, axis=0), (logits, wanted, rules, context)
    )
    wanted = wanted.replace(sample_index=np.arange(number, dtype=np.int32))
    context = context.replace(seen=context.seen[:NUM_CASES])
    token = np.asarray(RULED(logits, wanted, rules, context, np.ones(number, bool)).token)
    assert np.all(probs[token] > 0)
    assert chi_square(token, probs) > 1e-6


def take(batch: tuple[Any, ...], order: np.ndarray) -> tuple[Any, ...]:
    """Rows in another order; their slots are where they were."""
    logits, wanted, rules, context = batch
    moved = jax.tree.map(lambda leaf: leaf[order], (logits, wanted, rules, context.replace(seen=None)))
    return *moved[:3], moved[3].replace(seen=context.seen)


def sixty_four(*cases: Case) -> tuple[Any, ...]:
    """Arguments of `sample` for these cases and as many more as make 64, which have rules of all kinds."""
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
    logits, wanted, rules, context = sixty_four(Case(IMPOSSIBLE, (1, 2), ()))
    rng = np.random.default_rng(0)
    wanted = random_limits(rng, 64, VOCAB).replace(
        num_logprobs=rng.integers(-1, K + 1, 64).astype(np.int32), processed=rng.random(64) < 0.5
    )
    none = jax.device_get(plain_rules(64, VOCAB, sampling_cases.CONFIG))
    others = jax.tree.map(lambda leaf: np.roll(leaf, 7, axis=0), rules)

    def run(rules: LogitRules, active: np.ndarray | None = None) -> Sampled:
        return run_sixty_four((logits, wanted, rules, context), active)

    def mixed(kept: np.ndarray, rules: LogitRules, others: LogitRules) -> LogitRules:
        """`rules` in the rows that are kept, `others` in the rest."""
        return jax.tree.map(lambda a, b: np.where(kept[(...,) + (None,) * (a.ndim - 1)], a, b), rules, others)

    expected, without = run(rules), run(none)
    assert expected.failed[0] and not expected.failed.all() and not without.failed.any()
    assert (expected.token != without.token).sum() > 20
    order = rng.permutation(64)
    moved = run_sixty_four(take((logits, wanted, rules, context), order))
    assert_rows_equal(moved, jax.tree.map(lambda leaf: leaf[order], expected), np.arange(64))
    for kept in (np.arange(64) % 2 == 0, np.arange(64) % 5 == 1, np.arange(64) == 9):
        which = np.flatnonzero(kept)
        assert_rows_equal(run(mixed(kept, rules, none)), expected, which)
        assert_rows_equal(run(mixed(kept, none, rules)), without, which)
        assert_rows_equal(run(mixed(kept, rules, others)), expected, which)
        assert_rows_equal(run(rules, kept), expected, which)  # the others inactive


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
    lambda logits, wanted, rules, context, changed: sample(
        logits, wanted, rules, context, np.ones(len(logits), bool), max_logprobs=K, changed=changed
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
    raw, row = changed_batch.possible & ~batch.wanted.processed, np.arange(len(changed))
    expected = np.log(softmax(batch.logits.astype(np.float64)))[row, drawn.token]
    np.testing.assert_allclose(drawn.logprob[raw], expected[raw], rtol=1e-5, atol=2e-5)
    greedy = changed_batch.possible & batch.wanted.processed & (batch.wanted.temperature == 0)
    greedy &= batch.wanted.num_logprobs >= 0
    expected = np.log(softmax(np.where(changed_batch.possible[:, None], changed, 0)).max(axis=1))
    np.testing.assert_allclose(drawn.logprob[greedy], expected[greedy], rtol=1e-5, atol=2e-5)
    assert raw.any() and greedy.any()
