"""The sampler's own tests with native kernels, and the promises of these kernels alone."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core import sampling
from jaxserve.core.logit_rules import plain_rules
from pallas_kernels import native
from pallas_kernels.native import library
from tests.core import ruled_sampling_suite, sampling_suite
from tests.core.ruled_sampling_suite import (  # noqa: F401, collected here
    test_a_row_gives_the_same_whatever_rules_its_neighbours_have,
    test_a_row_with_every_token_ruled_out_fails_and_its_neighbours_do_not,
    test_draws_follow_the_distribution_that_rules_leave,
    test_logits_that_are_not_finite_fail_their_row_also_where_rules_hide_them,
    test_logprobs_are_of_the_raw_distribution_or_of_the_one_drawn_from,
    test_rows_with_rules_that_ask_for_no_logprobs_get_the_raw_one_of_their_token,
    test_what_a_users_function_made_of_the_logits_is_drawn_from_before_the_temperature,
    test_with_rules_in_any_combination_nothing_outside_the_support_is_drawn,
)
from tests.core.sampling_suite import (  # noqa: F401, collected here
    K,
    random_rows,
    test_a_row_gives_the_same_in_any_place_and_beside_any_neighbours,
    test_draws_of_different_samples_and_seeds_follow_the_distribution,
    test_fifty_thousand_draws_follow_the_distribution,
    test_from_a_temperature_of_1e_5_on_ties_are_drawn_at_random,
    test_greedy_takes_the_lowest_id_of_the_most_likely_whatever_else_is_set,
    test_inactive_rows_do_not_disturb_active_ones,
    test_limits_bind_only_the_rows_that_set_them,
    test_logprobs_ranks_and_top_lists_are_those_of_the_raw_distribution,
    test_min_p_looks_at_the_distribution_after_temperature,
    test_nothing_outside_the_support_is_ever_drawn,
    test_rows_that_ask_for_no_logprobs_get_none_beside_rows_that_do,
    test_the_logprob_of_a_token_is_the_same_number_in_the_top_list,
    test_ties_at_the_top_p_boundary_are_dropped_lowest_index_first,
    test_ties_with_the_kth_logit_are_kept,
    test_top_lists_have_their_fixed_size_also_beyond_the_vocabulary,
    test_top_p_counts_the_mass_that_min_p_and_top_k_have_left,
    test_zeros_of_both_signs_are_ties_in_the_top_list_as_they_are_for_greedy_rows,
)

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

_UNIT = 2.0**-24  # largest relative error of rounding to float32


@jax.jit
def plain_sample(logits, rows, position, active):
    """Does what `sampling_suite.SAMPLE` did before it is replaced."""
    rules = plain_rules(*logits.shape, sampling_suite.CONFIG)
    context = sampling_suite.context_of(position)
    return sampling.sample(logits, rows, rules, context, active, max_logprobs=K)


@pytest.fixture(autouse=True, scope="module")
def natively() -> Iterator[None]:
    """The programs of the tests above, with native kernels."""
    with pytest.MonkeyPatch.context() as patch:
        sample = functools.partial(sampling.sample, native=True)
        patch.setattr(sampling_suite, "sample", sample)
        changed = jax.jit(
            lambda logits, arrays, rules, context, changed: sample(
                logits, arrays, rules, context, np.ones(len(logits), bool), max_logprobs=K, changed=changed
            )
        )
        plainly = functools.partial(sampling_suite.sample_plainly, max_logprobs=K)
        patch.setattr(sampling_suite, "SAMPLE", jax.jit(lambda *args: plainly(*args)))
        patch.setattr(ruled_sampling_suite, "RULED", jax.jit(functools.partial(sample, max_logprobs=K)))
        patch.setattr(ruled_sampling_suite, "CHANGED", changed)
        ruled_sampling_suite.drawn_of_big_batch.cache_clear()
        yield
    ruled_sampling_suite.drawn_of_big_batch.cache_clear()


def test_the_tests_above_run_native_kernels():
    logits, arrays, _ = random_rows(8, 64, 50)
    arguments = logits, arrays, np.zeros(64, np.int32), np.ones(64, bool)
    assert "jaxserve_choose" in sampling_suite.SAMPLE.lower(*arguments).as_text()
    assert "jaxserve_choose" not in plain_sample.lower(*arguments).as_text()


def test_tokens_and_reports_are_those_of_the_plain_sampler_where_rounding_does_not_decide():
    logits, arrays, support = random_rows(2, 2000, 1000)
    rng = np.random.default_rng(1)
    arrays = arrays.replace(
        temperature=np.where(rng.random(2000) < 0.3, np.float32(0), arrays.temperature),
        num_logprobs=np.full(2000, K, np.int32),
    )
    arguments = logits, arrays, np.arange(2000, dtype=np.int32), np.ones(2000, bool)
    plain, native = (jax.device_get(program(*arguments)) for program in (plain_sample, sampling_suite.SAMPLE))
    greedy, same = arrays.temperature == 0, native.token == plain.token
    assert same[greedy].all()
    assert same[~support.ambiguous].mean() > 0.998  # a draw lies within rounding of the next token
    np.testing.assert_array_equal(native.top_ids, plain.top_ids)
    np.testing.assert_array_equal(native.failed, plain.failed)
    np.testing.assert_array_equal(native.rank[same], plain.rank[same])
    np.testing.assert_allclose(native.top_logprobs, plain.top_logprobs, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(native.logprob[same], plain.logprob[same], rtol=1e-6, atol=2e-6)


@jax.jit
def choose(logits, active, random, uniforms):
    """Chooses tokens at temperature 1, without limits."""
    one, zero = jnp.ones(len(logits), jnp.float32), jnp.zeros(len(logits), jnp.float32)
    return native.choose(logits, active, random, one, zero.astype(jnp.int32), one, zero, uniforms)


def drawn_with(logits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Tokens of one row of logits, one per pair of uniforms."""
    everywhere = np.ones(len(uniforms), bool)
    token, failed = choose(np.tile(logits, (len(uniforms), 1)), everywhere, everywhere, uniforms)
    assert not np.asarray(failed).any()
    return np.asarray(token)


def test_the_first_uniform_picks_the_block_and_the_second_the_token_in_it_by_inverse_transform():
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(300) < 0.3, -np.inf, rng.standard_normal(300)).astype(np.float32)
    logits[:5], logits[120:135], logits[256:290] = -np.inf, -np.inf, -np.inf
    uniforms = rng.integers(0, 2**23, (20_000, 2)).astype(np.float32) / 2**23
    uniforms[:4] = [[0, 0], [1 - 2**-23, 1 - 2**-23], [0, 1 - 2**-23], [1 - 2**-23, 0]]
    weights = np.exp(logits.astype(np.float64) - logits.max())
    blocks = np.pad(weights, (0, 384 - 300)).reshape(3, 128)
    block, close_block = inverse(np.tile(blocks.sum(axis=1), (len(uniforms), 1)), uniforms[:, 0])
    inside, close_inside = inverse(blocks[block], uniforms[:, 1])
    token = drawn_with(logits, uniforms)
    clear = ~close_block & ~close_inside
    assert clear.mean() > 0.99 and set(block) == {0, 1, 2}
    np.testing.assert_array_equal(token[clear], (block * 128 + inside)[clear])
    assert np.isfinite(logits[token]).all()


def test_of_equal_tokens_each_has_a_half_open_interval_of_its_own():
    below = 0.5 - 2**-23
    assert drawn_with(np.zeros(2, np.float32), np.float32([[0, below], [0, 0.5]])).tolist() == [0, 1]
    assert drawn_with(np.zeros(256, np.float32), np.float32([[below, 0], [0.5, 0]])).tolist() == [0, 128]


def inverse(weights: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row the first place at which the cumulative weight exceeds uniform * total, and whether that is a close thing."""
    cumulative = np.cumsum(weights, axis=1)
    target = uniform.astype(np.float64)[:, None] * cumulative[:, -1:]
    close = (np.abs(cumulative - target) < 64 * _UNIT * cumulative[:, -1:]) & (target > 0)
    return np.argmax(cumulative > target, axis=1), close.any(axis=1)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 127, 128, 129])
def test_the_only_possible_token_is_drawn_whatever_the_uniforms(size):
    uniforms = np.float32([[0, 0], [1 - 2**-24, 1 - 2**-24], [0.5, 0.5]])
    for only in {0, size // 2, size - 1}:
        logits = np.where(np.arange(size) == only, np.float32(-3), np.float32(-np.inf))
        assert drawn_with(logits, uniforms).tolist() == [only] * 3


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [5, 48, 300, 2100])
def test_rows_that_are_not_finite_fail_and_others_do_not(size, value, random):
    logits = np.random.default_rng(size).standard_normal((size + 3, size)).astype(np.float32)
    logits[np.arange(size), np.arange(size)] = value  # in every place
    logits[size:-1] = value
    active = np.arange(size + 3) != size + 1
    token, failed = map(
        np.asarray, choose(logits, active, np.full(size + 3, random), np.zeros((size + 3, 2), np.float32))
    )
    assert failed.tolist() == [*[value != -np.inf] * size, True, False, False]
    assert token[size + 1] == 0
    if value == -np.inf:
        assert np.all(token[:size] != np.arange(size))
    if not random:
        assert token[-1] == np.argmax(logits[-1])


@pytest.mark.parametrize("size", [1, 16, 1000, 1024, 1025, 2100])
def test_greedy_rows_take_the_first_of_the_largest(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(-4, 5, (60, size)).astype(np.float32) - rng.integers(0, 9, (60, 1)).astype(np.float32)
    logits[:20, : size // 2], logits[20:40, size // 2 + 1 :] = -np.inf, -np.inf
    logits[59] = -3e38
    nothing = np.zeros(60, bool)
    token, failed = map(np.asarray, choose(logits, ~nothing, nothing, np.zeros((60, 2), np.float32)))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=1))
    assert not failed.any()


@functools.partial(jax.jit, static_argnames="max_logprobs")
def report(logits, active, token, asked, *, max_logprobs):
    return native.report(logits, active, token, asked, max_logprobs=max_logprobs)


@pytest.mark.parametrize("size", [1, 7, 16, 50, 1000, 2100])
def test_top_lists_are_those_of_a_stable_sort(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(-4, 5, (60, size)).astype(np.float32)  # many ties
    logits[rng.random(logits.shape) < rng.random((60, 1)) / 2] = -np.inf
    logits[:, 0] = np.where(np.isfinite(logits).any(axis=1), logits[:, 0], 0)
    logits[0], logits[1] = np.arange(size), -np.arange(size)
    logits = logits / np.float32(4)
    active, asked = np.arange(60) % 5 != 2, np.arange(60) % 3 != 1
    token = rng.integers(0, size, 60).astype(np.int32)
    for count in (0, 1, 5, 20):
        logprob, rank, ids, values = map(np.asarray, report(logits, active, token, asked, max_logprobs=count))
        for row, x in enumerate(logits.astype(np.float64)):
            reported = active[row] and asked[row]
            order = np.argsort(-x, kind="stable")[:count]
            order = order[np.isfinite(x[order])] if reported else order[:0]
            normaliser = np.log(np.exp(x - x.max()).sum()) + x.max()
            logprobs, rounding = x - normaliser, 2e-6 + 4 * _UNIT * abs(normaliser)
            none = count - len(order)
            assert ids[row].tolist() == [*order.tolist(), *[-1] * none]
            np.testing.assert_allclose(values[row], [*logprobs[order], *[0] * none], atol=rounding)
            assert rank[row] == (1 + np.sum(x > x[token[row]]) if reported else 0)
            np.testing.assert_allclose(logprob[row], logprobs[token[row]] if active[row] else 0, atol=rounding)


def test_log_probabilities_of_a_large_vocabulary_are_exact_to_rounding():
    """64 sums run side by side: each rounds as often as it adds, which adds up to 4 sqrt(V / 64) units (cases.py); 16 more
    for the exponential, the logarithm and the last sums."""
    rng, size = np.random.default_rng(0), 151_936
    logits = (rng.standard_normal((3, size)) * np.array([[0.0], [1.0], [10.0]])).astype(np.float32)
    token = np.array([5, 99_999, size - 1], np.int32)
    everywhere = np.ones(3, bool)
    logprob, _, ids, _ = map(np.asarray, report(logits, everywhere, token, everywhere, max_logprobs=20))
    exact = logits.astype(np.float64)
    normaliser = np.log(np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1)) + exact.max(axis=1)
    expected = exact[np.arange(3), token] - normaliser
    bound = (4 * (size / 64) ** 0.5 + 16) * _UNIT + 2 * _UNIT * (np.abs(normaliser) + np.abs(expected))
    assert np.all(np.abs(logprob - expected) <= bound)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :20])
