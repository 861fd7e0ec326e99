"""The sampler against a float64 oracle that sorts, written from the order of operations in the documentation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax

from jaxserve import EngineConfig, sampling
from jaxserve.logit_rules import Context, plain_rules
from jaxserve.sampling import Sampled, SamplingRows, greedy_rows, sample

K = 5  # max_logprobs
AMBIGUOUS = 1e-6  # closer to a threshold than this, float32 may round to either side
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


def rows(number: int, **values: Any) -> SamplingRows:
    """Rows that sample from the whole distribution with a key of 1, with some fields changed; scalars are repeated."""
    plain = jax.device_get(greedy_rows(number)).replace(temperature=np.ones(number, np.float32))
    plain = plain.replace(key_data=np.ones((number, 2), np.uint32))
    changes = {}
    for name, value in values.items():
        old = getattr(plain, name)
        changes[name] = np.broadcast_to(np.asarray(value, old.dtype), old.shape)
    return plain.replace(**changes)


def draw(logits: Any, wanted: SamplingRows, position: Any = 0) -> Sampled:
    """`sample` with all rows active; a single row of logits, or position, serves all rows."""
    number = wanted.temperature.shape[0]
    logits = np.broadcast_to(np.asarray(logits, np.float32), (number, np.shape(logits)[-1]))
    position = np.broadcast_to(np.asarray(position, np.int32), (number,))
    return jax.device_get(SAMPLE(logits, wanted, position, np.ones(number, bool)))


@dataclasses.dataclass(frozen=True)
class Support:
    """What the oracle keeps of one row."""

    probs: np.ndarray  # renormalised; 0 for dropped tokens
    ambiguous: bool  # whether rounding could move a threshold

    @property
    def kept(self) -> np.ndarray:
        return self.probs > 0


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> Support:
    """temperature -> min_p -> top_k -> top_p on the renormalised distribution."""
    scaled = (logits.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    probs = softmax(scaled)
    ratio, min_p = probs / probs.max(), float(np.float32(min_p))
    ambiguous = 0 < min_p < 1 and bool(np.any(np.abs(ratio / min_p - 1) < AMBIGUOUS))
    scaled = np.where(ratio < min_p, -np.inf, scaled)
    if 0 < top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-top_k], -np.inf, scaled)
    if top_p < 1:
        allowed = 1 - float(np.float32(top_p))
        order = np.argsort(scaled, kind="stable")
        cumulative = np.cumsum(softmax(scaled)[order])
        ambiguous |= bool(np.any(np.abs(cumulative[:-1] - allowed) < AMBIGUOUS))
        dropped = order[:-1][cumulative[:-1] <= allowed]
        scaled[dropped] = -np.inf
    return Support(softmax(scaled), ambiguous)


def random_cases(seed: int, number: int, vocab_size: int) -> tuple[np.ndarray, SamplingRows, list[Support]]:
    """Rows of logits with and without ties and -inf, with parameters from one end of their ranges to the other."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((number, vocab_size)) * rng.choice([0.1, 1.0, 4.0], (number, 1))
    logits = np.where(rng.random((number, 1)) < 0.4, np.round(logits * 2) / 2, logits)
    sparse = rng.random((number, 1)) < 0.3
    logits = np.where(sparse & (rng.random(logits.shape) < rng.random((number, 1))), -np.inf, logits)
    single = rng.random(number) < 0.05
    logits[single] = -np.inf
    logits[np.arange(number), rng.integers(0, vocab_size, number)] = rng.standard_normal(number)
    logits = logits.astype(np.float32)
    some_p = rng.choice([1.0, 0.999, 0.9, 0.5, 0.1, 1e-3, 1e-6], number)
    wanted = rows(
        number,
        temperature=rng.choice([0.1, 0.7, 1.0, 2.0], number),
        top_k=rng.choice([0, 1, 2, 7, 20, vocab_size - 1, vocab_size, vocab_size + 3, 2**31 - 1], number),
        top_p=np.where(rng.random(number) < 0.5, some_p, 1 - rng.random(number)),
        min_p=rng.choice([0.0, 0.0, 0.0, 0.003, 0.1, 0.5, 1.0], number),
        key_data=rng.integers(0, 2**32, (number, 2)),
    )
    parameters = zip(logits, wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, strict=True)
    return logits, wanted, [oracle(*row) for row in parameters]


CASES = pytest.mark.parametrize(("seed", "number", "vocab_size"), [(0, 3000, 50), (1, 1500, 300), (2, 500, 1000)])


@CASES
def test_the_kept_tokens_and_their_weights_are_the_oracles(seed, number, vocab_size):
    logits, wanted, supports = random_cases(seed, number, vocab_size)
    weights = jax.jit(sampling._weights)(logits, wanted, np.ones(number, bool))
    num_skipped = 0
    for row, support in zip(np.asarray(weights, np.float64), supports, strict=True):
        if support.ambiguous:
            num_skipped += 1
            continue
        representable = support.probs > 1e-30 * support.probs.max()
        np.testing.assert_array_equal(
            (row > 0)[representable | ~support.kept], representable[representable | ~support.kept]
        )
        np.testing.assert_allclose(row / row.sum(), support.probs, rtol=1e-5, atol=1e-7)
    assert num_skipped < 0.02 * number, num_skipped


@CASES
def test_nothing_outside_the_support_is_ever_drawn(seed, number, vocab_size):
    logits, wanted, supports = random_cases(seed, number, vocab_size)
    kept, certain = np.stack([s.kept for s in supports]), ~np.array([s.ambiguous for s in supports])
    seen = np.zeros_like(kept)
    for position in range(8):
        token = draw(logits, wanted, position).token
        seen[np.arange(number), token] = True
    assert not (seen & ~kept)[certain].any()
    assert np.all((seen.sum(axis=1) == 1) | (kept.sum(axis=1) > 1) | ~certain)
    assert (seen.sum(axis=1) > 1).mean() > 0.3  # it does draw at random


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
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    assert chi_square(token, oracle(logits, **full).probs) > 1e-6


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


def support_of(logits: list[float], **settings: Any) -> set[int]:
    """All tokens among 512 draws. The vocabulary is filled up to eight with impossible ones: one program for all."""
    padded = [*logits, *[-np.inf] * (8 - len(logits))]
    return set(draw(padded, rows(512, **settings), np.arange(512)).token.tolist())


def test_ties_with_the_kth_logit_are_kept():
    assert support_of([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], top_k=2) == {1, 2, 3, 5}
    assert support_of([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], top_k=1) == {1}
    assert support_of([0.0, -0.0, -1.0, -0.0], top_k=1) == {0, 1, 3}


def test_ties_at_the_top_p_boundary_are_dropped_lowest_index_first():
    assert support_of([0.0] * 8, top_p=0.75) == {2, 3, 4, 5, 6, 7}  # 2/8 <= 1 - 0.75 are dropped
    assert support_of([0.0] * 8, top_p=0.5) == {4, 5, 6, 7}
    assert support_of([0.0] * 8, top_p=0.49) == {4, 5, 6, 7}
    assert support_of([0.0] * 8, top_p=0.51) == {3, 4, 5, 6, 7}
    assert support_of([0.0] * 8, top_p=1e-6) == {7}
    assert support_of([0.0, -np.inf, 0.0, -np.inf, 0.0, 0.0], top_p=0.5) == {4, 5}


def test_top_p_counts_the_mass_that_min_p_and_top_k_have_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert support_of(logits, top_p=0.75) == {0, 1, 2}
    assert support_of(logits, top_p=0.5) == {0, 1}
    assert support_of(logits, top_p=0.5, top_k=2) == {0}  # 3/7 of what is left lies below
    assert support_of(logits, top_p=0.5, min_p=0.6) == {0}
    assert support_of(logits, top_p=0.65, top_k=2) == {0, 1}


def test_min_p_looks_at_the_distribution_after_temperature():
    logits = np.log([0.6, 0.3, 0.1]).tolist()
    assert support_of(logits, min_p=0.4) == {0, 1}
    assert support_of(logits, min_p=0.4, temperature=0.5) == {0}  # 0.36 : 0.09 : 0.01
    assert support_of([1.0, 2.0, 2.0], min_p=1.0) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 9.9e-6])
def test_greedy_takes_the_lowest_id_of_the_most_likely_whatever_else_is_set(temperature):
    logits = [0.0, 2.0, 2.0, 1.0, 2.0]
    assert support_of(logits, temperature=temperature) == {1}
    assert support_of(logits, temperature=temperature, top_p=0.1, top_k=1, min_p=1.0) == {1}


def test_from_a_temperature_of_1e_5_on_ties_are_drawn_at_random():
    assert support_of([0.0, 2.0, 2.0, 1.0, 2.0], temperature=1e-5) == {1, 2, 4}


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
    in_pieces = sampling._top(20, piece)(jnp.asarray(logits))
    np.testing.assert_array_equal(in_pieces[1], ids)
    np.testing.assert_array_equal(in_pieces[0], values)


def test_a_row_gives_the_same_in_any_place_and_beside_any_neighbours():
    logits, wanted, _ = random_cases(6, 64, 300)
    rng = np.random.default_rng(6)
    wanted = wanted.replace(num_logprobs=rng.integers(-1, K + 1, 64).astype(np.int32))
    wanted = wanted.replace(sample_index=rng.integers(0, 9, 64).astype(np.int32))
    position = rng.integers(0, 2000, 64)
    expected = draw(logits, wanted, position)
    for order in (rng.permutation(64), rng.permutation(64)):
        moved = draw(logits[order], jax.tree.map(lambda leaf, order=order: leaf[order], wanted), position[order])
        assert_rows_equal(moved, jax.tree.map(lambda leaf, order=order: leaf[order], expected), np.arange(64))
    other_logits, others, _ = random_cases(7, 64, 300)
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
    logits, wanted, _ = random_cases(8, 64, 50)
    position, active = np.zeros(64, np.int32), np.arange(64) % 2 == 0
    expected = draw(logits, wanted)
    broken = np.where(active[:, None], logits, np.nan).astype(np.float32)
    drawn = jax.device_get(SAMPLE(broken, wanted, position, active))
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
    tokens = np.asarray(sampling._inverse(jnp.asarray(weights), jnp.asarray(uniform, jnp.float32)))
    counts = np.bincount(tokens)
    assert abs(counts[0] - 100) <= 1
    assert abs(counts[1] - 1e-6 * 2**23) <= 1
    assert np.all(np.diff(tokens) >= 0)
