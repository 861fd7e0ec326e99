"""The operations of an owner of sequences between steps: submit, abort, collect. All are pure, jittable and of fixed size.

Nothing raises inside of a jit: a row that is not valid ends at once with status ERROR, and a submission that finds no free
row gets the handle "none". `jaxserve.core.make_submission` builds submissions on the host, where mistakes do raise.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.columns import column, in_range
from jaxserve.core.logit_rules import LogitRules, penalised
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import SamplingArrays
from jaxserve.core.scheduler.state import EngineState, Queue, Status
from jaxserve.models import ModelConfig
from jaxserve.request import MAX_BIAS

T = TypeVar("T")


@record
class Submission(Record):
    """New sequences, W at a time; entries with `valid` False are padding."""

    tokens: Int32[Array, "W M"]  # prompts, padded at the end
    prompt_length: Int32[Array, " W"]  # tokens, at least 1 and at most M - 1
    max_tokens: Int32[Array, " W"]  # tokens to generate at most; clipped to what M leaves
    stop_token_ids: Int32[Array, "W Z"] = column(off=-1)  # end-of-sequence ids among them; -1: unused entry
    stop_sequences: Int32[Array, "W NS LS"] = column(off=-1)  # token ids, aligned at their end, -1 before it
    sampling: SamplingArrays  # W entries
    rules: LogitRules  # W entries
    num_prompt_logprobs: Int32[Array, " W"] = column(off=-1)  # as in `Queue`
    priority: Int32[Array, " W"]  # lower goes first
    follows: Bool[Array, " W"]  # whether this is one more sample of the request before it, whose prompt it repeats
    valid: Bool[Array, " W"]
    aux: Any = None  # initial data of a `LogitsFn`: a tree like `EngineState.aux`, [W, ...]


# The fields that a row of the queue takes over as they are.
_COPIED = tuple(name for name in Queue.__dataclass_fields__ if name in Submission.__dataclass_fields__)


@record
class Handles(Record):
    """The names of submitted sequences. Rows are reused, but a row and its generation together never are."""

    row_id: Int32[Array, " W"]  # Q = none: padding, or no row was free
    generation: Int32[Array, " W"]


def submit(
    state: EngineState, submission: Submission, *, model: ModelConfig, config: EngineConfig
) -> tuple[EngineState, Handles]:
    """Puts sequences into free queue rows, in order, the samples of one request together or not at all.

    The first request that finds too few free rows is refused, and so is everything after it: the `row_id` of their handles
    is Q, and they leave the state unchanged. An entry after padding is the first of its request, whatever `follows` says.

    Args:
      state: may be donated.
      submission: the sequences.
      model, config: static.

    Returns:
      The new state, and a handle for each entry of the submission.

    Raises:
      ValueError: while tracing, if the `aux` trees of the state and the submission differ.
    """
    if jax.tree.structure(state.aux) != jax.tree.structure(submission.aux):
        raise ValueError(
            f"the state's aux is {jax.tree.structure(state.aux)}, the submission's {jax.tree.structure(submission.aux)}: "
            "give init_state and the submission the same tree"
        )
    queue, queue_size = state.queue, state.queue.status.shape[0]
    width = submission.valid.shape[0]
    order = jnp.cumsum(submission.valid.astype(jnp.int32), dtype=jnp.int32) - 1
    first, last = _ends_of_groups(submission)
    (free,) = jnp.nonzero(queue.status == Status.FREE, size=width, fill_value=queue_size)
    free = free.astype(jnp.int32)
    row = jnp.where(submission.valid & (free[order[last]] < queue_size), free[order], queue_size)
    acceptable = _acceptable(submission, first, model, config)
    max_length = submission.prompt_length + jnp.minimum(
        submission.max_tokens, queue.tokens.shape[1] - submission.prompt_length
    )
    queue = queue.replace(
        **{name: _set_rows(getattr(queue, name), row, getattr(submission, name)) for name in _COPIED},
        num_tokens=queue.num_tokens.at[row].set(submission.prompt_length, mode="drop"),
        max_length=queue.max_length.at[row].set(max_length, mode="drop"),
        arrival=queue.arrival.at[row].set(state.next_arrival + order, mode="drop"),
        group=queue.group.at[row].set(state.next_arrival + order[first], mode="drop"),
        status=queue.status.at[row].set(
            jnp.where(acceptable, Status.WAITING.value, Status.ERROR.value).astype(jnp.int32), mode="drop"
        ),
        abort_requested=queue.abort_requested.at[row].set(False, mode="drop"),
        num_preemptions=queue.num_preemptions.at[row].set(0, mode="drop"),
        generation=queue.generation.at[row].add(1, mode="drop"),
    )
    handles = Handles(row_id=row, generation=queue.generation.at[row].get(mode="fill", fill_value=0))
    num_accepted = jnp.sum(row < queue_size, dtype=jnp.int32)
    aux = _set_rows(state.aux, row, submission.aux)
    return state.replace(queue=queue, aux=aux, next_arrival=state.next_arrival + num_accepted), handles


def abort(state: EngineState, mask: Bool[Array, " Q"], generation: Int32[Array, " Q"]) -> EngineState:
    """Asks the next step to abort the rows in `mask`, except those that have finished or are of another generation."""
    queue = state.queue
    unfinished = (queue.status == Status.WAITING) | (queue.status == Status.RUNNING)
    requested = queue.abort_requested | (mask & unfinished & (generation == queue.generation))
    return state.replace(queue=queue.replace(abort_requested=requested))


def collect(state: EngineState, mask: Bool[Array, " Q"], generation: Int32[Array, " Q"]) -> EngineState:
    """Frees the finished rows in `mask`, when their owner has read what it needs. Other generations stay as they are."""
    queue = state.queue
    collected = mask & (queue.status >= Status.STOP) & (generation == queue.generation)
    status = jnp.where(collected, Status.FREE.value, queue.status)
    return state.replace(queue=queue.replace(status=status))


def _ends_of_groups(submission: Submission) -> tuple[Int32[Array, " W"], Int32[Array, " W"]]:
    """Returns the first and the last entry of the request that each entry belongs to; padding is its own.

    valid   = [1 1 1 1 0 1]      first = [0 1 1 1 4 5]
    follows = [0 0 1 1 0 1]      last  = [0 3 3 3 4 5]
    """
    index = jnp.arange(submission.valid.shape[0], dtype=jnp.int32)
    follows = submission.follows & submission.valid & jnp.roll(submission.valid, 1) & (index > 0)
    first = lax.cummax(jnp.where(follows, 0, index))
    last = lax.cummin(jnp.where(jnp.roll(follows, -1), index[-1:], index), reverse=True)
    return first, last


def _acceptable(
    submission: Submission, first: Int32[Array, " W"], model: ModelConfig, config: EngineConfig
) -> Bool[Array, " W"]:
    sampling, rules, length = submission.sampling, submission.rules, submission.prompt_length
    in_prompt = jnp.arange(submission.tokens.shape[1], dtype=jnp.int32)[None, :] < length[:, None]
    in_vocab = (submission.tokens >= 0) & (submission.tokens < model.vocab_size)
    return (
        (length == length[first])
        & jnp.all((submission.tokens == submission.tokens[first]) | ~in_prompt, axis=1)
        & (length >= 1)
        & (length < submission.tokens.shape[1])
        & jnp.all(in_vocab | ~in_prompt, axis=1)
        & (submission.max_tokens >= 1)
        & in_range(sampling)
        & in_range(rules)
        & (sampling.num_logprobs >= -1)
        & (sampling.num_logprobs <= config.max_logprobs)
        & (submission.num_prompt_logprobs >= -1)
        & (submission.num_prompt_logprobs <= config.max_logprobs)
        & (config.penalties | ~penalised(rules))
        & jnp.all(jnp.abs(rules.bias) <= MAX_BIAS, axis=1)
        & jnp.all((rules.bias_ids >= -1) & (rules.bias_ids < model.vocab_size), axis=1)
        & jnp.all(rules.bad_words < model.vocab_size, axis=(1, 2))
    )


def _set_rows(rows: T, row: Int32[Array, " W"], new: T) -> T:
    return jax.tree.map(lambda old, leaf: old.at[row].set(leaf, mode="drop"), rows, new)
