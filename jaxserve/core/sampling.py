"""From logits to tokens: greedy, temperature, min-p, top-k, top-p, and log probabilities.

The order of operations is vLLM's: the rules of `logit_rules`, a user's function, temperature, then min-p, then top-k,
then top-p on what is left, renormalised. Nothing sorts the vocabulary. Both thresholds are found bit by bit: an
order-preserving map takes a float32 to a uint32, and 32
passes that each count (top-k) or add up (top-p) what lies below a candidate finish_step its 32 bits. The draw needs two
uniforms per row: one picks a block of the vocabulary, one a token within it. Whatever no row asks for is a loop of no trips.

A row's result depends on that row alone. Randomness is counter-based: the key of a draw is made of the request's seed, the
sample's index and the token's position, so nothing that happened before it matters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxserve.core import logit_rules
from jaxserve.core.logit_rules import Context, LogitRules
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.request import GREEDY_BELOW
from pallas_kernels.native import sampling as native_sampling

_BLOCK = 128  # tokens per block of the two-level draw
_TOP_K_PIECE = 16  # the largest k for which XLA:GPU has a kernel; for more it sorts whole rows
_ALL = 1 << 30


@record
class SamplingArrays(Record):
    """Sampling parameters, one row per sequence; meanings and ranges as in `jaxserve.SamplingParams`."""

    temperature: Float32[Array, " Q"]  # below 1e-5: greedy
    top_k: Int32[Array, " Q"]  # 0: off
    top_p: Float32[Array, " Q"]  # 1: off
    min_p: Float32[Array, " Q"]  # 0: off
    key_data: UInt32[Array, "Q 2"]  # threefry key made from the seed
    sample_index: Int32[Array, " Q"]  # which of a request's samples this is; folded into the key
    num_logprobs: Int32[Array, " Q"]  # most likely tokens reported beside the sampled one; -1: no ranks either
    processed: Bool[Array, " Q"]  # whether logprobs are of the distribution that is drawn from; else of the raw one

    @property
    def random(self) -> Bool[Array, " Q"]:
        """Rows that draw at random."""
        return self.temperature >= GREEDY_BELOW


@record
class Sampled(Record):
    """One token per row, and what is known about it."""

    token: Int32[Array, " R"]
    logprob: Float32[Array, " R"]  # of the token
    rank: Int32[Array, " R"]  # of the token, 1 = most likely; 0 if the row asked for no logprobs
    top_ids: Int32[Array, "R K"]  # most likely tokens, first first; -1: none, or the row asked for no logprobs
    top_logprobs: Float32[Array, "R K"]  # of top_ids; 0 where there is none
    failed: Bool[Array, " R"]  # no distribution to draw from: logits not finite, or every token ruled out


def greedy_arrays(num_rows: int) -> SamplingArrays:
    """Greedy rows that ask for no logprobs."""
    return SamplingArrays(
        temperature=jnp.zeros((num_rows,), jnp.float32),
        top_k=jnp.zeros((num_rows,), jnp.int32),
        top_p=jnp.ones((num_rows,), jnp.float32),
        min_p=jnp.zeros((num_rows,), jnp.float32),
        key_data=jnp.zeros((num_rows, 2), jnp.uint32),
        sample_index=jnp.zeros((num_rows,), jnp.int32),
        num_logprobs=jnp.full((num_rows,), -1, jnp.int32),
        processed=jnp.zeros((num_rows,), bool),
    )


def sample(
    logits: Float32[Array, "R V"],
    rows: SamplingArrays,
    rules: LogitRules,
    context: Context,
    active: Bool[Array, " R"],
    *,
    max_logprobs: int,
    changed: Float32[Array, "R V"] | None = None,
    native: bool = False,
) -> Sampled:
    """Draws one token per row.

    Args:
      logits: raw logits.
      rows: sampling parameters of the rows.
      rules: of the rows.
      context: of the rows.
      active: rows that count; what the others get is meaningless.
      max_logprobs: K, size of the top lists.
      changed: what a user's function made of the logits that the rules left, to draw from; None: the rules are applied here.
      native: whether the kernels of `pallas_kernels.native` choose and report. They draw by the same algorithm, but add in
        another order: what is drawn may differ where a sum is within rounding of a bound.
    """
    ruled = active if changed is not None else active & logit_rules.in_force(rules, context)
    choose, report = (_choose_natively, _report_natively) if native else (_choose, _report_raw)
    given = (logits if changed is None else changed, rules, context)  # operands of `processed`, for `if_any`

    def processed(logits: Float32[Array, "R V"], rules: LogitRules, context: Context) -> Float32[Array, "R V"]:
        return logit_rules.apply(logits, rules, context, active) if changed is None else logits

    def choose_by_rules(chosen: tuple[Array, Array], *given: Any) -> tuple[Array, Array]:
        new = choose(processed(*given), rows, context, ruled)
        return jax.tree.map(functools.partial(jnp.where, ruled), new, chosen)

    chosen = (jnp.zeros_like(context.num_tokens), jnp.zeros_like(active))
    if changed is None:
        chosen = choose(logits, rows, context, active & ~ruled)
        # In a loop that returns tokens only: the raw logits, needed afterwards, are then not copied.
        token, failed = if_any(ruled, choose_by_rules, chosen, *given)
    else:
        token, failed = choose_by_rules(chosen, *given)

    asked = active & (rows.num_logprobs >= 0)
    found = report(logits, token, active, asked & ~rows.processed, max_logprobs)
    failed = failed | (active & ~jnp.isfinite(found[0]))

    def report_processed(
        found: tuple[Array, ...],
        logits: Array,
        rules: LogitRules,
        context: Context,
        rows: SamplingArrays,
        *of_rows: Array,
    ) -> tuple[Array, ...]:
        token, active, asked = of_rows
        if changed is None:
            logits = logit_rules.apply(logits, rules, context, active)
        logprobs = _processed_logprobs(logits, rows, active)
        return _report(found, logprobs, jnp.zeros_like(logprobs[:, :1]), token, asked)

    if_asked = _each_in_turn if native else if_any
    asked = asked & rows.processed
    found = if_asked(asked, report_processed, found, *given, rows, token, active, asked)
    logprob, rank, top_ids, top_logprobs = found
    return Sampled(token=token, logprob=logprob, rank=rank, top_ids=top_ids, top_logprobs=top_logprobs, failed=failed)


def _each_in_turn(
    wanted: Bool[Array, " R"],
    compute: Callable[..., tuple[Array, ...]],
    found: tuple[Array, ...],
    logits: Float32[Array, "R V"],
    rules: LogitRules,
    context: Context,
    *more: Any,
) -> tuple[Array, ...]:
    """`if_any` row by row: only rows that want it cost, and arrays on the way are of one row."""
    (order,) = jnp.nonzero(wanted, size=wanted.shape[0], fill_value=0)
    operands = (logits, rules, context.replace(seen=None), *more)

    def one(index: Int32[Array, ""], found: tuple[Array, ...]) -> tuple[Array, ...]:
        row = order[index]
        of_row = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, 1), (found, *operands))
        of_row = (*of_row[:3], of_row[3].replace(seen=context.seen), *of_row[4:])  # which has a row per slot
        return jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new, row, 0), found, compute(*of_row))

    return lax.fori_loop(0, jnp.sum(wanted, dtype=jnp.int32), one, found)


def _choose(
    logits: Float32[Array, "R V"], rows: SamplingArrays, context: Context, wanted: Bool[Array, " R"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """A token for each wanted row, and whether there is none to be had; meaningless elsewhere."""

    def draw(token: Int32[Array, " R"], logits: Float32[Array, "R V"], random: Bool[Array, " R"]) -> Array:
        return jnp.where(random, _pick(_weights(logits, rows, random), _uniforms(rows, context)), token)

    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    failed = ~jnp.isfinite(jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0])
    return if_any(wanted & rows.random, draw, token, logits, wanted & rows.random), wanted & failed


def _choose_natively(
    logits: Float32[Array, "R V"], rows: SamplingArrays, context: Context, wanted: Bool[Array, " R"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """As `_choose`."""
    random = wanted & rows.random
    uniforms = jnp.zeros((random.shape[0], 2), jnp.float32)
    uniforms = if_any(random, lambda _, rows, context: _uniforms(rows, context), uniforms, rows, context)
    return native_sampling.choose(
        logits, wanted, random, rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniforms
    )


def _report_raw(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    active: Bool[Array, " R"],
    asked: Bool[Array, " R"],
    max_logprobs: int,
) -> tuple[Array, ...]:
    """Log probability of each row's token; of rows that ask also its rank, and the top ids and their log probabilities."""
    del active
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    found = (
        (jnp.take_along_axis(logits, token[:, None], axis=1) - normaliser)[:, 0],
        jnp.zeros_like(token),
        jnp.full((token.shape[0], max_logprobs), -1, jnp.int32),
        jnp.zeros((token.shape[0], max_logprobs), jnp.float32),
    )
    return if_any(asked, _report, found, logits, normaliser, token, asked)


def _report_natively(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    active: Bool[Array, " R"],
    asked: Bool[Array, " R"],
    max_logprobs: int,
) -> tuple[Array, ...]:
    """As `_report_raw`."""
    return native_sampling.report(logits, active, token, asked, max_logprobs=max_logprobs)


def _report(
    found: tuple[Array, ...],
    logits: Float32[Array, "R V"],
    normaliser: Float32[Array, "R 1"],
    token: Int32[Array, " R"],
    wanted: Bool[Array, " R"],
) -> tuple[Array, ...]:
    """(logprob, rank, top ids, their logprobs) of wanted rows, in place of those of `found`."""
    max_logprobs = found[2].shape[1]
    num_top = min(max_logprobs, logits.shape[1])
    values, ids = lax.platform_dependent(logits, cuda=_top(num_top, _TOP_K_PIECE), default=_top(num_top, _ALL))
    possible = values > -jnp.inf
    unused = ((0, 0), (0, max_logprobs - num_top))
    ids = jnp.pad(jnp.where(possible, ids, -1), unused, constant_values=-1)
    values = jnp.pad(jnp.where(possible, values - normaliser, 0), unused)
    of_token = jnp.take_along_axis(logits, token[:, None], axis=1)
    rank = 1 + jnp.sum(logits > of_token, axis=-1, dtype=jnp.int32)
    new = ((of_token - normaliser)[:, 0], rank, ids, values)
    return tuple(
        jnp.where(jnp.expand_dims(wanted, tuple(range(1, leaf.ndim))), leaf, old)
        for leaf, old in zip(new, found, strict=True)
    )


def token_logprobs(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    num_logprobs: Int32[Array, " R"],
    *,
    max_logprobs: int,
    native: bool = False,
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R K"], Float32[Array, "R K"]]:
    """Raw log probability and rank of given tokens, and the most likely ones, for rows that ask (num_logprobs >= 0).

    Rows that do not ask get NaN, 0, -1 and 0.
    """
    asked = num_logprobs >= 0
    if native:
        logprob, rank, ids, values = native_sampling.report(logits, asked, token, asked, max_logprobs=max_logprobs)
        return jnp.where(asked, logprob, jnp.nan), rank, ids, values
    nothing = (
        jnp.full(token.shape, jnp.nan, jnp.float32),
        jnp.zeros_like(token),
        jnp.full((token.shape[0], max_logprobs), -1, jnp.int32),
        jnp.zeros((token.shape[0], max_logprobs), jnp.float32),
    )
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprob, rank, ids, values = _report(nothing, logits, normaliser, token, asked)
    return logprob, rank, ids, values


def _top(k: int, piece: int) -> Callable[[Float32[Array, "R V"]], tuple[Float32[Array, "R K"], Int32[Array, "R K"]]]:
    """`lax.top_k`, at most `piece` at a time: those found are taken out before the next are looked for."""

    def top(logits: Float32[Array, "R V"]) -> tuple[Float32[Array, "R K"], Int32[Array, "R K"]]:
        left = jnp.maximum(logits, jnp.finfo(jnp.float32).min)  # -inf means: taken out
        left = jnp.where(left == 0, 0, left)  # `lax.top_k` puts 0.0 before -0.0, whichever has the lower id
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        found: list[Array] = []
        for first in range(0, k, piece):
            ids = lax.top_k(left, min(piece, k - first))[1].astype(jnp.int32)
            left = left.at[rows, ids].set(-jnp.inf)
            found.append(ids)
        ids = jnp.concatenate(found, axis=1) if found else jnp.zeros((logits.shape[0], 0), jnp.int32)
        return jnp.take_along_axis(logits, ids, axis=1), ids

    return top


def _weights(logits: Float32[Array, "R V"], rows: SamplingArrays, random: Bool[Array, " R"]) -> Float32[Array, "R V"]:
    """What random rows draw in proportion to: 0 for dropped tokens, 1 for the most likely one."""
    temperature = jnp.where(random, rows.temperature, 1.0)
    scaled = logits / temperature[:, None]
    scaled = jnp.where(scaled == 0, 0, scaled)  # -0.0 and 0.0 must compare equal; adding 0.0 is optimised away
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # the largest is exactly 1
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    ordered = _ordered_bits(scaled)

    def keep_top_k(weights: Float32[Array, "R V"], ordered: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
        k = jnp.where(random & (rows.top_k > 0), rows.top_k, logits.shape[1])
        threshold = _largest(lambda bits: jnp.sum(ordered >= bits, axis=-1, dtype=jnp.int32) >= k, k.shape)
        return jnp.where(ordered >= threshold[:, None], weights, 0)

    def keep_top_p(weights: Float32[Array, "R V"], ordered: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
        dropped = (1 - rows.top_p) * jnp.sum(weights, axis=-1)

        def below(bits: UInt32[Array, "R 1"]) -> Float32[Array, " R"]:
            return jnp.sum(jnp.where(ordered < bits, weights, 0), axis=-1)

        threshold = _largest(lambda bits: below(bits) <= dropped, dropped.shape)
        threshold = jnp.minimum(threshold, jnp.max(ordered, axis=-1))[:, None]
        limited = (random & (rows.top_p < 1))[:, None]
        kept = jnp.where((ordered >= threshold) | ~limited, weights, 0)
        return _drop_ties(kept, (ordered == threshold) & limited, dropped - below(threshold))

    weights = if_any(random & (rows.top_k > 0), keep_top_k, weights, ordered)
    return if_any(random & (rows.top_p < 1), keep_top_p, weights, ordered)


def _processed_logprobs(
    logits: Float32[Array, "R V"], rows: SamplingArrays, active: Bool[Array, " R"]
) -> Float32[Array, "R V"]:
    """Log probabilities that tokens are drawn with; greedy rows: of the logits at temperature 1."""
    random = active & rows.random

    def of_random(weights: Float32[Array, "R V"], logits: Float32[Array, "R V"]) -> Float32[Array, "R V"]:
        return jnp.where(random[:, None], _weights(logits, rows, random), weights)

    weights = if_any(random, of_random, logits, logits)
    drawn_from = jnp.where(weights > 0, jnp.log(weights) - jnp.log(jnp.sum(weights, axis=-1, keepdims=True)), -jnp.inf)
    return jnp.where(random[:, None], drawn_from, jax.nn.log_softmax(logits, axis=-1))


def _drop_ties(
    weights: Float32[Array, "R V"], tied: Bool[Array, "R V"], excess: Float32[Array, " R"]
) -> Float32[Array, "R V"]:
    """Of equal tokens at the top-p threshold, drops the first ones that fit into the excess mass, as a stable sort does."""
    weight = jnp.max(jnp.where(tied, weights, 0), axis=-1)
    num_tied = jnp.sum(tied, axis=-1, dtype=jnp.int32)
    fitting = jnp.floor(excess / jnp.where(weight > 0, weight, 1)).astype(jnp.int32)
    num_dropped = jnp.clip(fitting, 0, jnp.maximum(num_tied - 1, 0))

    def drop(weights: Float32[Array, "R V"], tied: Bool[Array, "R V"]) -> Float32[Array, "R V"]:
        order = jnp.cumsum(tied.astype(jnp.int32), axis=-1, dtype=jnp.int32)
        return jnp.where(tied & (order <= num_dropped[:, None]), 0, weights)

    return if_any(num_dropped > 0, drop, weights, tied)


def _ordered_bits(x: Float32[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Unsigned integers that compare as the floats do; x holds no NaN and no -0.0."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = (bits >> jnp.uint32(31)).astype(bool)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[UInt32[Array, "R 1"]], Bool[Array, " R"]], shape: tuple[int, ...]) -> UInt32[Array, " R"]:
    """The largest uint32 per row for which `holds`, a condition that is true at 0 and, once false, stays false."""

    def settle_bit(index: Int32[Array, ""], value: UInt32[Array, " R"]) -> UInt32[Array, " R"]:
        candidate = value | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(candidate[:, None]), candidate, value)

    return lax.fori_loop(0, 32, settle_bit, jnp.zeros(shape, jnp.uint32))


def _uniforms(rows: SamplingArrays, context: Context) -> Float32[Array, "R 2"]:
    def one(key_data: UInt32[Array, " 2"], sample_index: Int32[Array, ""], position: Int32[Array, ""]):
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample_index), position)
        return jax.random.uniform(key, (2,), jnp.float32)

    return jax.vmap(one)(rows.key_data, rows.sample_index, context.num_tokens)


def _pick(weights: Float32[Array, "R V"], uniforms: Float32[Array, "R 2"]) -> Int32[Array, " R"]:
    """Inverse transform sampling in two levels. A token of weight 0 is never picked, whatever the rounding."""
    _, vocab_size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab_size % _BLOCK))).reshape(weights.shape[0], -1, _BLOCK)
    block = _inverse(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _inverse(inside, uniforms[:, 1])


def _inverse(weights: Float32[Array, "R X"], uniform: Float32[Array, " R"]) -> Int32[Array, " R"]:
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    possible = weights > 0
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)[None, :]
    first = jnp.min(jnp.where(possible & (cumulative > target), index, weights.shape[1]), axis=-1)
    last = jnp.max(jnp.where(possible, index, 0), axis=-1)
    return jnp.minimum(first, last)
