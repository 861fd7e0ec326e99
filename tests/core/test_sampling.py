"""The sampler against a float64 oracle that sorts, without and with rules on the logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.core import logit_rules, sampling, vocab_search
from jaxserve.core.sampling import SamplingArrays, sample
from tests.core.ruled_sampling_suite import (  # noqa: F401, collected here
    assert_rows_follow_the_oracle,
    make_batch,
    test_a_row_gives_the_same_whatever_rules_its_neighbours_have,
    test_a_row_with_every_token_ruled_out_fails_and_its_neighbours_do_not,
    test_draws_follow_the_distribution_that_rules_leave,
    test_logits_that_are_not_finite_fail_their_row_also_where_rules_hide_them,
    test_logprobs_are_of_the_raw_distribution_or_of_the_one_drawn_from,
    test_rows_with_rules_that_ask_for_no_logprobs_get_the_raw_one_of_their_token,
    test_what_a_users_function_made_of_the_logits_is_drawn_from_before_the_temperature,
    test_with_rules_in_any_combination_nothing_outside_the_support_is_drawn,
)
from tests.core.sampling_cases import Support, softmax
from tests.core.sampling_suite import (  # noqa: F401, collected here
    BATCHES,
    DRAWS,
    chi_square,
    draw,
    random_rows,
    rows,
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


def test_the_chi_square_test_notices_a_slightly_wrong_distribution():
    logits = (1.5 * np.random.default_rng(11).standard_normal(300)).astype(np.float32)
    token = draw(logits, rows(DRAWS, temperature=1.05), np.arange(DRAWS)).token
    assert chi_square(token, softmax(logits.astype(np.float64))) < 1e-6


@pytest.mark.parametrize("piece", [1, 3, 16])
def test_the_largest_are_found_in_pieces_as_at_once_ties_and_banned_tokens_included(piece):
    logits = np.random.default_rng(0).integers(0, 9, (50, 40)).astype(np.float32)  # many ties
    logits[:20] = np.where(logits[:20] < 7, -np.inf, logits[:20])  # fewer left than are asked for
    values, ids = lax.top_k(jnp.asarray(logits), 20)
    in_pieces = vocab_search.top(20, piece)(jnp.asarray(logits))
    np.testing.assert_array_equal(in_pieces[1], ids)
    np.testing.assert_array_equal(in_pieces[0], values)


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


def test_the_test_above_notices_penalties_of_prompt_tokens(monkeypatch):
    penalise = logit_rules._penalise
    monkeypatch.setattr(
        logit_rules, "_penalise", lambda logits, rules, seen: penalise(logits, rules, seen + (seen & 1))
    )
    batch = make_batch(22, 60, 4)
    program = jax.jit(lambda *args: sample(*args, max_logprobs=0))
    with pytest.raises(AssertionError):
        assert_rows_follow_the_oracle(jax.device_get(program(*batch.arguments, np.ones(240, bool))), batch)
