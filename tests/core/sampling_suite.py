"""The promises of the sampler as test functions, which `test_sampling` and the tests of native kernels both collect."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxserve import EngineConfig
from jaxserve.core.logit_rules import Context, plain_rules
from jaxserve.core.sampling import Sampled, SamplingArrays, greedy_arrays, sample
from tests.core.sampling_cases import Support, softmax, support_of

K = 5  # max_logprobs


CONFIG = EngineConfig(max_slots=1, max_model_len=8)


def context_of(position: jax.Array) -> Context:
    """Returns the context of rows for which only the position of the token to draw matters."""
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
    """Calls `sample` without rules."""
    rules = plain_rules(logits.shape[0], logits.shape[1], CONFIG)
    return sample(logits, rows, rules, context_of(position), active, max_logprobs=max_logprobs)


SAMPLE = jax.jit(functools.partial(sample_plainly, max_logprobs=K))


def rows(number: int, **values: Any) -> SamplingArrays:
    """Returns rows that sample from the whole distribution with a key of 1, with some fields changed; scalars are repeated."""
    plain = jax.device_get(greedy_arrays(number)).replace(temperature=np.ones(number, np.float32))
    plain = plain.replace(key_data=np.ones((number, 2), np.uint32))
    changes = {}
    for name, value in values.items():
        old = getattr(plain, name)
        changes[name] = np.broadcast_to(np.asarray(value, old.dtype), old.shape)
    return plain.replace(**changes)


def draw(logits: Any, arrays: SamplingArrays, position: Any = 0, active: Any = True) -> Sampled:
    """`sample`; a single row of logits, or position, serves all rows.

    Few rows are filled up with inactive ones, so that they share a program.
    """
    number = arrays.temperature.shape[0]
    logits = np.broadcast_to(np.asarray(logits, np.float32), (number, np.shape(logits)[-1]))
    position = np.broadcast_to(np.asarray(position, np.int32), (number,))
    padded = np.minimum(np.arange(max(number, 512)), number - 1)
    active = np.broadcast_to(active, (number,))[padded] & (np.arange(len(padded)) < number)
    logits, arrays, position = jax.tree.map(lambda leaf: leaf[padded], (logits, arrays, position))
    drawn = jax.device_get(SAMPLE(logits, arrays, position, active))
    return jax.tree.map(lambda leaf: leaf[:number], drawn)


def random_limits(rng: np.random.Generator, number: int, vocab_size: int) -> SamplingArrays:
    """Draws sampling parameters from the whole of their ranges."""
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
    """Draws rows with and without ties and banned tokens; in some only one token is possible."""
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
    """Returns random logits, parameters, and their support from the oracle."""
    rng = np.random.default_rng(seed)
    logits, arrays = random_logits(rng, number, vocab_size), random_limits(rng, number, vocab_size)
    return logits, arrays, support_of(logits, arrays)


# 100,000 rows in all; the draw has one block of 128 tokens, two, or eight.
BATCHES = pytest.mark.parametrize(
    ("seed", "number", "vocab_size"), [(0, 80_000, 24), (1, 18_000, 130), (2, 2_000, 1000)]
)


@BATCHES
def test_nothing_outside_the_support_is_ever_drawn(seed, number, vocab_size):
    logits, arrays, support = random_rows(seed, number, vocab_size)
    drawn = np.zeros_like(support.kept)
    for position in range(5):
        drawn[np.arange(number), draw(logits, arrays, position).token] = True
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


def chi_square(token: np.ndarray, probs: np.ndarray) -> float:
    """Returns the p-value of the counts; tokens expected fewer than ten times count as one."""
    counts, expected = np.bincount(token, minlength=len(probs)), probs * len(token)
    rare = expected < 10
    observed = [*counts[~rare], counts[rare].sum()]
    expected_counts = [*expected[~rare], expected[rare].sum()]
    if expected_counts[-1] == 0:
        assert observed[-1] == 0
        observed, expected_counts = observed[:-1], expected_counts[:-1]
    return float(scipy.stats.chisquare(observed, expected_counts).pvalue)


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
    arrays = rows(
        400,
        num_logprobs=rng.integers(0, K + 1, 400),
        temperature=rng.choice([0.0, 0.5, 1.5], 400),
        top_p=rng.choice([1.0, 0.5], 400),
        top_k=rng.choice([0, 10], 400),
    )
    drawn = draw(logits, arrays)
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
    arrays = rows(1, temperature=0.0, num_logprobs=max_logprobs)
    drawn = sample_plainly(logits, arrays, jnp.zeros(1, jnp.int32), jnp.ones(1, bool), max_logprobs=max_logprobs)
    assert drawn.top_ids.tolist() == [[1, 2, 0, -1, -1, -1, -1][:max_logprobs]]
    assert drawn.top_logprobs.shape == (1, max_logprobs)


def test_a_row_gives_the_same_in_any_place_and_beside_any_neighbours():
    logits, arrays, _ = random_rows(6, 64, 300)
    rng = np.random.default_rng(6)
    arrays = arrays.replace(num_logprobs=rng.integers(-1, K + 1, 64).astype(np.int32))
    arrays = arrays.replace(sample_index=rng.integers(0, 9, 64).astype(np.int32))
    position = rng.integers(0, 2000, 64)
    expected = draw(logits, arrays, position)
    for order in (rng.permutation(64), rng.permutation(64)):
        moved = draw(logits[order], jax.tree.map(lambda leaf, order=order: leaf[order], arrays), position[order])
        assert_rows_equal(moved, jax.tree.map(lambda leaf, order=order: leaf[order], expected), np.arange(64))
    other_logits, others, _ = random_rows(7, 64, 300)
    for neighbours in (others, rows(64, temperature=0.0), rows(64, num_logprobs=2, top_p=0.5)):
        is_target = np.arange(64) % 3 == 0
        mixed = jax.tree.map(
            lambda a, b, is_target=is_target: np.where(is_target[(...,) + (None,) * (a.ndim - 1)], a, b),
            arrays,
            neighbours,
        )
        drawn = draw(np.where(is_target[:, None], logits, other_logits), mixed, np.where(is_target, position, 5))
        assert_rows_equal(drawn, expected, np.flatnonzero(is_target))


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
    logits, arrays, _ = random_rows(8, 64, 50)
    active = np.arange(64) % 2 == 0
    expected = draw(logits, arrays)
    broken = np.where(active[:, None], logits, np.nan).astype(np.float32)
    drawn = draw(broken, arrays, active=active)
    assert_rows_equal(drawn, expected, np.flatnonzero(active))
