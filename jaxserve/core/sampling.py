"""From logits to tokens: greedy, temperature, min-p, top-k, top-p, and log probabilities.

The order of operations is vLLM's: the rules of `logit_rules`, a user's function, temperature, then min-p, then top-k, then
top-p on the renormalised rest. Nothing sorts the vocabulary. The thresholds of top-k and top-p are found bit by bit: an
order-preserving map takes a float32 to a uint32, and each of 32 passes counts (top-k) or adds up (top-p) what lies below a
candidate. A draw takes two uniforms: one picks a block of the vocabulary, the other a token within it. Work that no
sequence asks for is skipped at run time.

A sequence's result depends on that sequence alone. Randomness is counter-based: the key of a draw is made of the request's
seed, the sample's index and the token's position, so nothing that happened before matters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxserve.core import logit_rules
from jaxserve.core.columns import column, off_rows
from jaxserve.core.logit_rules import Context, LogitRules
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.core.vocab_search import drop_ties, largest, ordered_bits, pick, top
from jaxserve.request import GREEDY_BELOW
from pallas_kernels.native import sampling as native_sampling

_TOP_K_PIECE = 16  # the largest k for which XLA:GPU has a kernel; for a larger one it sorts the whole vocabulary
_ANY_SIZE = 1 << 30


@record
class SamplingArrays(Record):
    """Sampling parameters, one row per sequence; meanings and ranges as in `jaxserve.SamplingParams`."""

    temperature: Float32[Array, " Q"] = column(off=0, parameter=True)  # below 1e-5: greedy
    top_k: Int32[Array, " Q"] = column(off=0, parameter=True)
    top_p: Float32[Array, " Q"] = column(off=1, parameter=True)
    min_p: Float32[Array, " Q"] = column(off=0, parameter=True)
    key_data: UInt32[Array, "Q 2"]  # threefry key made from the seed
    sample_index: Int32[Array, " Q"]  # index of the sample in its request; folded into the key
    num_logprobs: Int32[Array, " Q"] = column(off=-1)  # most likely tokens to report; -1: no ranks either
    processed: Bool[Array, " Q"]  # whether logprobs are of the distribution that is drawn from; else of the raw one

    @property
    def random(self) -> Bool[Array, " Q"]:
        """Whether each row draws at random."""
        return self.temperature >= GREEDY_BELOW


@record
class Sampled(Record):
    """One token per sequence, and its log probabilities."""

    token: Int32[Array, " R"]
    logprob: Float32[Array, " R"]  # log probability of the token
    rank: Int32[Array, " R"]  # rank of the token, 1 = most likely; 0 if the request wants no logprobs
    top_ids: Int32[Array, "R K"]  # most likely tokens, most likely first; -1: none, or the request wants no logprobs
    top_logprobs: Float32[Array, "R K"]  # log probabilities of top_ids; 0 where there is no id
    failed: Bool[Array, " R"]  # whether there is no distribution: logits are not finite, or every token is ruled out


def greedy_arrays(num_rows: int) -> SamplingArrays:
    """Returns the parameters of greedy sequences that want no logprobs."""
    return off_rows(SamplingArrays, num_rows, {})


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
    """Draws one token for each of R sequences.

    Args:
      logits: raw logits.
      rows: sampling parameters, one entry per sequence.
      rules: logit rules, one entry per sequence.
      context: the sequences' tokens and lengths.
      active: the sequences that count; the results of others are meaningless.
      max_logprobs: static; K, the size of the top lists.
      changed: the logits to draw from, as a user's function left them after the rules. None: the rules are applied here.
      native: static; whether the kernels of `pallas_kernels.native` choose and report. They use the same algorithm, but add
        in another order: the token may differ where a sum is within rounding of a threshold.
    """
    has_rules = active if changed is not None else active & logit_rules.in_force(rules, context)
    choose, report = (_choose_natively, _report_natively) if native else (_choose, _report_raw)
    inputs = (logits if changed is None else changed, rules, context)  # operands of `ruled_logits`, for `if_any`

    def ruled_logits(logits: Float32[Array, "R V"], rules: LogitRules, context: Context) -> Float32[Array, "R V"]:
        return logit_rules.apply(logits, rules, context, active) if changed is None else logits

    def choose_by_rules(choice: tuple[Array, Array], *inputs: Any) -> tuple[Array, Array]:
        new = choose(ruled_logits(*inputs), rows, context, has_rules)
        return jax.tree.map(functools.partial(jnp.where, has_rules), new, choice)

    choice = (jnp.zeros_like(context.num_tokens), jnp.zeros_like(active))
    if changed is None:
        choice = choose(logits, rows, context, active & ~has_rules)
        # The loop of `if_any` returns tokens only, so the raw logits, which are needed afterwards, are not copied.
        token, failed = if_any(has_rules, choose_by_rules, choice, *inputs)
    else:
        token, failed = choose_by_rules(choice, *inputs)

    wants_logprobs = active & (rows.num_logprobs >= 0)
    logprobs = report(logits, token, active, wants_logprobs & ~rows.processed, max_logprobs)
    failed = failed | (active & ~jnp.isfinite(logprobs[0]))

    def report_processed(
        logprobs: tuple[Array, ...],
        logits: Array,
        rules: LogitRules,
        context: Context,
        rows: SamplingArrays,
        *per_sequence: Array,
    ) -> tuple[Array, ...]:
        token, active, wants_logprobs = per_sequence
        if changed is None:
            logits = logit_rules.apply(logits, rules, context, active)
        processed = _processed_logprobs(logits, rows, active)
        return _report(logprobs, processed, jnp.zeros_like(processed[:, :1]), token, wants_logprobs)

    wants_processed = wants_logprobs & rows.processed
    if_needed = _one_by_one if native else if_any
    logprobs = if_needed(wants_processed, report_processed, logprobs, *inputs, rows, token, active, wants_processed)
    logprob, rank, top_ids, top_logprobs = logprobs
    return Sampled(token=token, logprob=logprob, rank=rank, top_ids=top_ids, top_logprobs=top_logprobs, failed=failed)


def _one_by_one(
    needed: Bool[Array, " R"],
    compute: Callable[..., tuple[Array, ...]],
    logprobs: tuple[Array, ...],
    logits: Float32[Array, "R V"],
    rules: LogitRules,
    context: Context,
    *more: Any,
) -> tuple[Array, ...]:
    """Does the work of `if_any` for one sequence at a time: only sequences that need it cost time, and arrays stay small."""
    (order,) = jnp.nonzero(needed, size=needed.shape[0], fill_value=0)
    operands = (logits, rules, context.replace(seen=None), *more)

    def one(index: Int32[Array, ""], logprobs: tuple[Array, ...]) -> tuple[Array, ...]:
        place = order[index]
        inputs = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, place, 1), (logprobs, *operands))
        inputs = (*inputs[:3], inputs[3].replace(seen=context.seen), *inputs[4:])  # `seen` has an entry per slot
        new = compute(*inputs)
        return jax.tree.map(lambda old, leaf: lax.dynamic_update_slice_in_dim(old, leaf, place, 0), logprobs, new)

    return lax.fori_loop(0, jnp.sum(needed, dtype=jnp.int32), one, logprobs)


def _choose(
    logits: Float32[Array, "R V"], rows: SamplingArrays, context: Context, needed: Bool[Array, " R"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """Returns a token where `needed`, and whether there is no distribution; the token is meaningless elsewhere."""

    def draw(token: Int32[Array, " R"], logits: Float32[Array, "R V"], random: Bool[Array, " R"]) -> Array:
        return jnp.where(random, pick(_weights(logits, rows, random), _uniforms(rows, context)), token)

    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    failed = ~jnp.isfinite(jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0])
    return if_any(needed & rows.random, draw, token, logits, needed & rows.random), needed & failed


def _choose_natively(
    logits: Float32[Array, "R V"], rows: SamplingArrays, context: Context, needed: Bool[Array, " R"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """Does what `_choose` does, on a native kernel."""
    random = needed & rows.random
    uniforms = jnp.zeros((random.shape[0], 2), jnp.float32)
    uniforms = if_any(random, lambda _, rows, context: _uniforms(rows, context), uniforms, rows, context)
    return native_sampling.choose(
        logits, needed, random, rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniforms
    )


def _report_raw(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    active: Bool[Array, " R"],
    wants_logprobs: Bool[Array, " R"],
    max_logprobs: int,
) -> tuple[Array, ...]:
    """Returns the raw log probability of each token; where wanted also its rank, the top ids and their log probabilities."""
    del active
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = (
        (jnp.take_along_axis(logits, token[:, None], axis=1) - normaliser)[:, 0],
        jnp.zeros_like(token),
        jnp.full((token.shape[0], max_logprobs), -1, jnp.int32),
        jnp.zeros((token.shape[0], max_logprobs), jnp.float32),
    )
    return if_any(wants_logprobs, _report, logprobs, logits, normaliser, token, wants_logprobs)


def _report_natively(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    active: Bool[Array, " R"],
    wants_logprobs: Bool[Array, " R"],
    max_logprobs: int,
) -> tuple[Array, ...]:
    """Does what `_report_raw` does, on a native kernel."""
    return native_sampling.report(logits, active, token, wants_logprobs, max_logprobs=max_logprobs)


def _report(
    logprobs: tuple[Array, ...],
    logits: Float32[Array, "R V"],
    normaliser: Float32[Array, "R 1"],
    token: Int32[Array, " R"],
    needed: Bool[Array, " R"],
) -> tuple[Array, ...]:
    """Replaces the (logprob, rank, top ids, their logprobs) of `logprobs` where `needed`."""
    max_logprobs = logprobs[2].shape[1]
    num_top = min(max_logprobs, logits.shape[1])
    values, ids = lax.platform_dependent(logits, cuda=top(num_top, _TOP_K_PIECE), default=top(num_top, _ANY_SIZE))
    possible = values > -jnp.inf
    unused = ((0, 0), (0, max_logprobs - num_top))
    ids = jnp.pad(jnp.where(possible, ids, -1), unused, constant_values=-1)
    values = jnp.pad(jnp.where(possible, values - normaliser, 0), unused)
    of_token = jnp.take_along_axis(logits, token[:, None], axis=1)
    rank = 1 + jnp.sum(logits > of_token, axis=-1, dtype=jnp.int32)
    new = ((of_token - normaliser)[:, 0], rank, ids, values)
    return tuple(
        jnp.where(jnp.expand_dims(needed, tuple(range(1, leaf.ndim))), leaf, old)
        for leaf, old in zip(new, logprobs, strict=True)
    )


def token_logprobs(
    logits: Float32[Array, "R V"],
    token: Int32[Array, " R"],
    num_logprobs: Int32[Array, " R"],
    *,
    max_logprobs: int,
    native: bool = False,
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R K"], Float32[Array, "R K"]]:
    """Returns the raw log probability and rank of tokens, and the most likely tokens with theirs.

    Args:
      logits: raw logits.
      token: the tokens.
      num_logprobs: most likely tokens to report for each; -1: nothing, and the results are NaN, 0, -1 and 0.
      max_logprobs: static; K.
      native: static; as in `sample`.
    """
    needed = num_logprobs >= 0
    if native:
        logprob, rank, ids, values = native_sampling.report(logits, needed, token, needed, max_logprobs=max_logprobs)
        return jnp.where(needed, logprob, jnp.nan), rank, ids, values
    empty = (
        jnp.full(token.shape, jnp.nan, jnp.float32),
        jnp.zeros_like(token),
        jnp.full((token.shape[0], max_logprobs), -1, jnp.int32),
        jnp.zeros((token.shape[0], max_logprobs), jnp.float32),
    )
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprob, rank, ids, values = _report(empty, logits, normaliser, token, needed)
    return logprob, rank, ids, values


def _weights(logits: Float32[Array, "R V"], rows: SamplingArrays, random: Bool[Array, " R"]) -> Float32[Array, "R V"]:
    """Returns the weights that random sequences draw in proportion to: 0 for dropped tokens, 1 for the most likely one."""
    temperature = jnp.where(random, rows.temperature, 1.0)
    scaled = logits / temperature[:, None]
    scaled = jnp.where(scaled == 0, 0, scaled)  # -0.0 and 0.0 must compare equal; adding 0.0 is optimised away
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # the largest is exactly 1
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    ordered = ordered_bits(scaled)

    def keep_top_k(weights: Float32[Array, "R V"], ordered: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
        k = jnp.where(random & (rows.top_k > 0), rows.top_k, logits.shape[1])
        threshold = largest(lambda bits: jnp.sum(ordered >= bits, axis=-1, dtype=jnp.int32) >= k, k.shape)
        return jnp.where(ordered >= threshold[:, None], weights, 0)

    def keep_top_p(weights: Float32[Array, "R V"], ordered: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
        dropped = (1 - rows.top_p) * jnp.sum(weights, axis=-1)

        def below(bits: UInt32[Array, "R 1"]) -> Float32[Array, " R"]:
            return jnp.sum(jnp.where(ordered < bits, weights, 0), axis=-1)

        threshold = largest(lambda bits: below(bits) <= dropped, dropped.shape)
        threshold = jnp.minimum(threshold, jnp.max(ordered, axis=-1))[:, None]
        limited = (random & (rows.top_p < 1))[:, None]
        remaining = jnp.where((ordered >= threshold) | ~limited, weights, 0)
        return drop_ties(remaining, (ordered == threshold) & limited, dropped - below(threshold))

    weights = if_any(random & (rows.top_k > 0), keep_top_k, weights, ordered)
    return if_any(random & (rows.top_p < 1), keep_top_p, weights, ordered)


def _processed_logprobs(
    logits: Float32[Array, "R V"], rows: SamplingArrays, active: Bool[Array, " R"]
) -> Float32[Array, "R V"]:
    """Returns the log probabilities that tokens are drawn with; greedy sequences get those at temperature 1."""
    random = active & rows.random

    def of_random(weights: Float32[Array, "R V"], logits: Float32[Array, "R V"]) -> Float32[Array, "R V"]:
        return jnp.where(random[:, None], _weights(logits, rows, random), weights)

    weights = if_any(random, of_random, logits, logits)
    drawn_from = jnp.where(weights > 0, jnp.log(weights) - jnp.log(jnp.sum(weights, axis=-1, keepdims=True)), -jnp.inf)
    return jnp.where(random[:, None], drawn_from, jax.nn.log_softmax(logits, axis=-1))


def _uniforms(rows: SamplingArrays, context: Context) -> Float32[Array, "R 2"]:
    def one(key_data: UInt32[Array, " 2"], sample_index: Int32[Array, ""], position: Int32[Array, ""]):
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample_index), position)
        return jax.random.uniform(key, (2,), jnp.float32)

    return jax.vmap(one)(rows.key_data, rows.sample_index, context.num_tokens)
