"""The rules that change a request's logits before a token is chosen: allowed ids, bad words, minimum length, bias, penalties.

The order is vLLM's: allowed ids, bad words, minimum length, bias, repetition, frequency, presence. A kind of rule that no
sequence has is skipped at run time, and the logits of a sequence depend on that sequence alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxserve.config import EngineConfig
from jaxserve.core.columns import axis_sizes, column, off_rows
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record

BITS = 32  # ids per word of `LogitRules.allowed`


@record
class LogitRules(Record):
    """One row per sequence; meanings and ranges as in `jaxserve.SamplingParams`."""

    presence_penalty: Float32[Array, " Q"] = column(off=0, parameter=True)
    frequency_penalty: Float32[Array, " Q"] = column(off=0, parameter=True)
    repetition_penalty: Float32[Array, " Q"] = column(off=1, parameter=True)
    bias_ids: Int32[Array, "Q NB"] = column(off=-1)  # distinct token ids; -1: unused entry
    bias: Float32[Array, "Q NB"]  # added to the logits of bias_ids
    restricted: Bool[Array, " Q"]  # whether only allowed ids may be drawn
    allowed: UInt32[Array, "Q V/32"]  # bit i of word w: id 32 w + i may be drawn
    bad_words: Int32[Array, "Q NW LW"] = column(off=-1)  # token ids, aligned at their end, -1 before it
    min_tokens: Int32[Array, " Q"] = column(off=0, parameter=True)


@record
class Context(Record):
    """The tokens and lengths of R sequences that draw a token."""

    tokens: Int32[Array, "R M"]  # prompt, then generated; stale beyond num_tokens
    num_tokens: Int32[Array, " R"]  # prompt + generated; the position of the token to draw
    prompt_length: Int32[Array, " R"]  # tokens
    stop_token_ids: Int32[Array, "R Z"]  # -1: unused entry
    slot: Int32[Array, " R"]  # S = none
    seen: Int32[Array, "S V"] | None  # see `EngineState.seen`; None: no penalties in the config

    @property
    def num_generated(self) -> Int32[Array, " R"]:
        """Tokens after the prompt."""
        return self.num_tokens - self.prompt_length


def plain_rules(num_rows: int, vocab_size: int, config: EngineConfig) -> LogitRules:
    """Returns rules that change nothing."""
    return off_rows(LogitRules, num_rows, axis_sizes(vocab_size, config))


def penalised(rules: LogitRules) -> Bool[Array, " R"]:
    """Returns whether each sequence has penalties, which need to know the tokens that it has seen."""
    return (rules.presence_penalty != 0) | (rules.frequency_penalty != 0) | (rules.repetition_penalty != 1)


def in_force(rules: LogitRules, context: Context) -> Bool[Array, " R"]:
    """Returns whether `apply` may change the logits of each sequence."""
    return (
        penalised(rules)
        | rules.restricted
        | jnp.any(rules.bias_ids >= 0, axis=1)
        | jnp.any(rules.bad_words[:, :, -1:] >= 0, axis=(1, 2))
        | (context.num_generated < rules.min_tokens)
    )


def apply(
    logits: Float32[Array, "R V"], rules: LogitRules, context: Context, active: Bool[Array, " R"]
) -> Float32[Array, "R V"]:
    """Applies the rules of each sequence to its logits. Returns -inf for tokens that may not be drawn.

    Args:
      logits: raw logits.
      rules: logit rules, one entry per sequence.
      context: the sequences' tokens and lengths.
      active: the sequences that count; the logits of others mean nothing afterwards.
    """
    early = context.num_generated < rules.min_tokens
    logits = if_any(active & rules.restricted, _keep_allowed, logits, rules)
    if rules.bad_words.shape[1]:
        some = jnp.any(rules.bad_words[:, :, -1] >= 0, axis=1)
        logits = if_any(active & some, _drop_bad_words, logits, rules, context.tokens, context.num_tokens)
    logits = if_any(active & early, _forbid_stops, logits, early, context.stop_token_ids)
    if rules.bias_ids.shape[1]:
        logits = if_any(active & jnp.any(rules.bias_ids >= 0, axis=1), _add_bias, logits, rules)
    if context.seen is None:
        return logits
    return if_any(active & penalised(rules), _penalise_slots, logits, rules, context.seen, context.slot)


def _ban(logits: Float32[Array, "R V"], ids: Int32[Array, "R X"], banned: Bool[Array, "R X"]) -> Float32[Array, "R V"]:
    """Gives the logit -inf to the ids that are banned."""
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[row, jnp.where(banned, ids, logits.shape[1])].set(-jnp.inf, mode="drop")


def _keep_allowed(logits: Float32[Array, "R V"], rules: LogitRules) -> Float32[Array, "R V"]:
    bits = rules.allowed[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)[None, None, :]
    may = (bits & jnp.uint32(1)).astype(bool).reshape(logits.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(may | ~rules.restricted[:, None], logits, -jnp.inf)


def _drop_bad_words(
    logits: Float32[Array, "R V"], rules: LogitRules, tokens: Int32[Array, "R M"], num_tokens: Int32[Array, " R"]
) -> Float32[Array, "R V"]:
    words = rules.bad_words
    recent = ending(tokens, num_tokens, words.shape[2] - 1)[:, None, :]
    completes = jnp.all((words[:, :, :-1] < 0) | (words[:, :, :-1] == recent), axis=2)
    return _ban(logits, words[:, :, -1], completes & (words[:, :, -1] >= 0))


def _forbid_stops(
    logits: Float32[Array, "R V"], early: Bool[Array, " R"], stop_token_ids: Int32[Array, "R Z"]
) -> Float32[Array, "R V"]:
    return _ban(logits, stop_token_ids, early[:, None] & (stop_token_ids >= 0))


def _add_bias(logits: Float32[Array, "R V"], rules: LogitRules) -> Float32[Array, "R V"]:
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    ids = jnp.where(rules.bias_ids >= 0, rules.bias_ids, logits.shape[1])
    return logits.at[row, ids].add(rules.bias, mode="drop")


def _penalise_slots(
    logits: Float32[Array, "R V"], rules: LogitRules, seen: Int32[Array, "S V"], slot: Int32[Array, " R"]
) -> Float32[Array, "R V"]:
    return _penalise(logits, rules, seen.at[slot].get(mode="clip"))


def _penalise(logits: Float32[Array, "R V"], rules: LogitRules, seen: Int32[Array, "R V"]) -> Float32[Array, "R V"]:
    """Penalises repetition of all tokens seen (Keskar et al., 2019), then frequency and presence of generated ones."""
    repetition = rules.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, repeated, logits)
    count = (seen >> 1).astype(jnp.float32)
    logits = logits - rules.frequency_penalty[:, None] * count
    return logits - jnp.where(count > 0, rules.presence_penalty[:, None], 0)


def ending(tokens: Int32[Array, "R M"], num_tokens: Int32[Array, " R"], length: int) -> Int32[Array, "R length"]:
    """Returns the last `length` tokens of each sequence, with -2 in front where a sequence has fewer."""
    position = num_tokens[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None, :]
    return jnp.where(position >= 0, jnp.take_along_axis(tokens, position, axis=1, mode="clip"), -2)
