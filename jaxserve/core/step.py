"""The step: one iteration of continuous batching as a pure function, and the loops around it.

    state, output  = step(params, state, ...)            one iteration
    state, outputs = run_steps(params, state, n, ...)    up to n of them, outputs stacked, for a host that streams and refills
    state, results = run(params, state, ...)             until nothing is left

The three are plain functions, for use inside a caller's `jax.jit`. `jaxserve.core.programs` has them jitted for a host.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import copy_pages
from jaxserve.core.draw import draw_tokens, nothing_drawn
from jaxserve.core.forward import PromptLogprobs, forward_batch, no_prompt_logprobs
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import Sampled
from jaxserve.core.scheduler.state import EngineState, Status
from jaxserve.core.scheduler.token_counts import count_tokens
from jaxserve.core.scheduler.transitions import finish_step, samples, schedule
from jaxserve.models import ModelConfig
from jaxserve.models.bind import bind
from jaxserve.models.prepare import Params, prepare


@record
class StepOutput(Record):
    """The output of one step. For a slot that did not sample, only `row_id`, `num_new` and `status` mean anything."""

    row_id: Int32[Array, " S"]  # queue row in each slot; Q = none
    num_new: Int32[Array, " S"]  # tokens whose keys and values were computed
    sampled: Bool[Array, " S"]  # whether a token was drawn
    drawn: Sampled  # one entry per slot
    status: Int32[Array, " S"]  # the row's `Status` after the step
    prompt: PromptLogprobs  # for prompt tokens in the batch whose requests ask for them
    num_waiting: Int32[Array, ""]  # rows waiting after admission
    num_free_pages: Int32[Array, ""]  # while the step ran
    num_preempted: Int32[Array, ""]  # sequences that lost their slot in this step


@record
class StepOutputs(Record):
    """The outputs of one call of `run_steps`."""

    steps: StepOutput  # each field stacked, [n, ...]; entries from num_steps on are stale
    num_steps: Int32[Array, ""]
    status: Int32[Array, " Q"]  # a `Status` per row, after the last step
    generation: Int32[Array, " Q"]
    num_preemptions: Int32[Array, " Q"]
    num_free_pages: Int32[Array, ""]  # after the last step


@record
class RunResults(Record):
    """The tokens that `run` generated, one entry per queue row; tokens beyond `num_generated` are stale."""

    token_ids: Int32[Array, "Q max_new"]
    logprobs: Float32[Array, "Q max_new"]  # log probabilities of token_ids under the raw distribution
    num_generated: Int32[Array, " Q"]
    status: Int32[Array, " Q"]  # a `Status`
    top_ids: Int32[Array, "Q max_new K"]
    top_logprobs: Float32[Array, "Q max_new K"]
    prompt_logprobs: Float32[
        Array, "Q M_or_0"
    ]  # of prompt tokens by position; NaN: the first token, or the row does not ask
    num_steps: Int32[Array, ""]


def step(
    params: Params,
    state: EngineState,
    *,
    model: ModelConfig,
    config: EngineConfig,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, StepOutput]:
    """Does one iteration: abort, admit, plan, forward, sample, retire.

    Args:
      params: `nnx.split(Transformer(model))[1]`; each call may bring new ones. Call `prepare` before a loop of your own,
        or every step does it again.
      state: the state that the previous step returned; may be donated.
      model: static.
      config: static.
      logits_fn: static; changes the logits that tokens are drawn from.

    Returns:
      The new state, and the output of the step.

    Raises:
      ValueError: while tracing, if the state was made with another configuration.
    """
    _check_shapes(state, config)
    params = prepare(params, model, config.backend, config.weight_dtype)
    num_preempted = jnp.sum(state.queue.num_preemptions, dtype=jnp.int32)
    state, plan = schedule(state, config=config)
    state = state.replace(pool=copy_pages(state.pool, plan.copy_from, plan.copy_to))
    sampled = samples(state, plan.num_new)
    pool, forward = forward_batch(params, state, plan, model=model, config=config)
    state = count_tokens(state, sampled)
    aux, drawn = draw_tokens(bind(params, model), state, forward.hidden, sampled, logits_fn, config=config)
    before, state = state, state.replace(aux=aux)
    state = finish_step(state.replace(pool=pool), plan.num_new, drawn.token, drawn.failed)
    output = StepOutput(
        row_id=before.slots.row_id,
        num_new=plan.num_new,
        sampled=sampled & ~drawn.failed,
        drawn=drawn,
        status=state.queue.status.at[before.slots.row_id].get(mode="fill", fill_value=Status.FREE),
        prompt=forward.prompt,
        num_waiting=jnp.sum(before.queue.status == Status.WAITING, dtype=jnp.int32),
        num_free_pages=before.table.num_free,
        num_preempted=jnp.sum(before.queue.num_preemptions, dtype=jnp.int32) - num_preempted,
    )
    return state, output


def run_steps(
    params: Params,
    state: EngineState,
    num_steps: Int32[Array, ""],
    *,
    model: ModelConfig,
    config: EngineConfig,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, StepOutputs]:
    """Does up to `num_steps` iterations in one loop on the device, and stacks their outputs.

    It stops earlier when nothing is left to do, or when a row has finished and no other waits for its slot, so that the host
    can refill the queue.

    Args:
      params, state, model, config, logits_fn: as in `step`.
      num_steps: traced; the largest number that counts is `config.max_steps_per_call`.

    Returns:
      The new state, and the outputs of the steps.
    """
    params = prepare(params, model, config.backend, config.weight_dtype)
    capacity = config.max_steps_per_call
    ring = empty_outputs(capacity, config).steps
    limit = jnp.minimum(num_steps, capacity)

    def go_on(carry: tuple[EngineState, StepOutput, Array, Array]) -> Bool[Array, ""]:
        state, _, index, needs_host = carry
        return (index < limit) & ~needs_host & has_work(state)

    def one_step(carry: tuple[EngineState, StepOutput, Array, Array]) -> tuple[EngineState, StepOutput, Array, Array]:
        state, ring, index, _ = carry
        num_finished = _num_finished(state)
        state, output = step(params, state, model=model, config=config, logits_fn=logits_fn)
        ring = jax.tree.map(lambda stack, leaf: stack.at[index].set(leaf), ring, output)
        finished = _num_finished(state) > num_finished
        return state, ring, index + 1, finished & ~jnp.any(state.queue.status == Status.WAITING)

    start = (state, ring, jnp.int32(0), jnp.asarray(False))
    state, ring, num_done, _ = lax.while_loop(go_on, one_step, start)
    queue = state.queue
    return state, StepOutputs(
        steps=ring,
        num_steps=num_done,
        status=queue.status,
        generation=queue.generation,
        num_preemptions=queue.num_preemptions,
        num_free_pages=state.table.num_free,
    )


def run(
    params: Params,
    state: EngineState,
    *,
    model: ModelConfig,
    config: EngineConfig,
    max_new_tokens: int,
    num_top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, RunResults]:
    """Iterates until every submitted sequence has finished, in one compiled loop: no array leaves the device in between.

    Args:
      params, state, model, config, logits_fn: as in `step`.
      max_new_tokens: columns of the results. Tokens of a sequence beyond them are generated and in the state's queue, but
        their log probabilities are dropped.
      num_top_logprobs: K of the results, at most `config.max_logprobs`; filled for rows that ask for logprobs.
      prompt_logprobs: whether the results have room for those of prompts; filled for rows that ask for them.

    Returns:
      The new state, and the generated tokens.

    Raises:
      ValueError: if `num_top_logprobs` is above `config.max_logprobs`, or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1: it is the width of the results")
    if not 0 <= num_top_logprobs <= config.max_logprobs:
        raise ValueError(
            f"num_top_logprobs={num_top_logprobs} must lie in [0, max_logprobs={config.max_logprobs}]: "
            "raise max_logprobs in EngineConfig"
        )
    params = prepare(params, model, config.backend, config.weight_dtype)
    queue_size = config.queue_size
    shape = (queue_size, max_new_tokens)
    columns = (
        jnp.zeros(shape, jnp.float32),
        jnp.full((*shape, num_top_logprobs), -1, jnp.int32),
        jnp.zeros((*shape, num_top_logprobs), jnp.float32),
    )
    of_prompt = jnp.full((queue_size, config.max_sequence_len if prompt_logprobs else 0), jnp.nan, jnp.float32)

    def one_step(carry: tuple[EngineState, tuple[Array, ...], Array]) -> tuple[EngineState, tuple[Array, ...], Array]:
        state, (*columns, of_prompt), index = carry
        state, output = step(params, state, model=model, config=config, logits_fn=logits_fn)
        row = jnp.where(output.sampled, output.row_id, queue_size)
        column = (state.queue.num_tokens - state.queue.prompt_length).at[row].get(mode="fill", fill_value=0) - 1
        new = (
            output.drawn.logprob,
            output.drawn.top_ids[:, :num_top_logprobs],
            output.drawn.top_logprobs[:, :num_top_logprobs],
        )
        columns = [old.at[row, column].set(value, mode="drop") for old, value in zip(columns, new, strict=True)]
        prompt = output.prompt
        of_prompt = of_prompt.at[prompt.row_id, prompt.position].set(prompt.logprob, mode="drop")
        return state, (*columns, of_prompt), index + 1

    start = (state, (*columns, of_prompt), jnp.int32(0))
    state, arrays, num_steps = lax.while_loop(lambda carry: has_work(carry[0]), one_step, start)
    logprobs, top_ids, top_logprobs, of_prompt = arrays
    queue = state.queue
    position = queue.prompt_length[:, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
    return state, RunResults(
        token_ids=jnp.take_along_axis(queue.tokens, position, axis=1, mode="clip"),
        logprobs=logprobs,
        num_generated=queue.num_tokens - queue.prompt_length,
        status=queue.status,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        prompt_logprobs=of_prompt,
        num_steps=num_steps,
    )


def _check_shapes(state: EngineState, config: EngineConfig) -> None:
    """Raises ValueError if the state was made with other capacities than those of `config`."""
    queue, table, pages = state.queue, state.table, state.pool.k[0]
    shapes = {
        "queue_size": (queue.tokens.shape[0], config.queue_size),
        "max_model_len": (queue.tokens.shape[1], config.max_sequence_len),
        "max_slots": (table.page_ids.shape[0], config.max_slots),
        "page_size": (pages.shape[2], config.page_size),
        "num_pages": (pages.shape[0], config.num_pages or pages.shape[0]),
        "max_stop_token_ids": (queue.stop_token_ids.shape[1], config.max_stop_token_ids),
        "max_stop_sequences": (queue.stop_sequences.shape[1], config.max_stop_sequences),
        "max_logit_bias": (queue.rules.bias_ids.shape[1], config.max_logit_bias),
        "max_bad_words": (queue.rules.bad_words.shape[1], config.max_bad_words),
        "penalties": (state.seen is not None, config.penalties),
    }
    for name, (actual, configured) in shapes.items():
        if actual != configured:
            raise ValueError(
                f"the state was made for {name}={actual}, but config has {configured}: use one config for both"
            )


def _num_finished(state: EngineState) -> Int32[Array, ""]:
    return jnp.sum(state.queue.status >= Status.STOP, dtype=jnp.int32)


def has_work(state: EngineState) -> Bool[Array, ""]:
    """Returns whether any row waits or runs."""
    return jnp.any((state.queue.status == Status.WAITING) | (state.queue.status == Status.RUNNING))


def empty_outputs(num_steps: int, config: EngineConfig) -> StepOutputs:
    """Returns room for the outputs of `num_steps` steps."""

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: zeros(num_steps, *leaf.shape, dtype=leaf.dtype), tree)

    slots, rows = config.max_slots, config.queue_size
    steps = StepOutput(
        row_id=zeros(num_steps, slots),
        num_new=zeros(num_steps, slots),
        sampled=zeros(num_steps, slots, dtype=bool),
        drawn=stacked(nothing_drawn(config)),
        status=zeros(num_steps, slots),
        prompt=stacked(no_prompt_logprobs(config)),
        num_waiting=zeros(num_steps),
        num_free_pages=zeros(num_steps),
        num_preempted=zeros(num_steps),
    )
    return StepOutputs(
        steps=steps,
        num_steps=zeros(),
        status=zeros(rows),
        generation=zeros(rows),
        num_preemptions=zeros(rows),
        num_free_pages=zeros(),
    )
