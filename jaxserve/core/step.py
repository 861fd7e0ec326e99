"""The step: one iteration of continuous batching as a pure function, and the loops around it.

    state, output  = step(params, state, ...)            one iteration
    state, outputs = run_steps(params, state, n, ...)    up to n of them, outputs stacked, for a host that streams and refills
    state, results = run(params, state, ...)             until nothing is left

The three are plain functions, for use inside a caller's `jax.jit`. `programs` holds the only jit and the only donation, but for
`engine_programs`, which are the Engine's own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core import logit_rules
from jaxserve.core.cache import copy_pages
from jaxserve.core.forward import PromptLogprobs, forward_batch, no_prompt_logprobs
from jaxserve.core.logit_rules import Context
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import Sampled, sample
from jaxserve.core.scheduler.state import EngineState, Status
from jaxserve.core.scheduler.submission import Handles, Submission, abort, collect, submit
from jaxserve.core.scheduler.token_counts import count_tokens
from jaxserve.core.scheduler.transitions import finish_step, samples, schedule
from jaxserve.models import ModelConfig, graphdef_of
from jaxserve.models.prepare import prepare
from pallas_kernels.backend import compiles_for_cuda


@record
class StepOutput(Record):
    """What one step did. Entries of slots that did not sample are meaningless except `row_id` and `num_new`."""

    row_id: Int32[Array, " S"]  # queue row in each slot; Q = none
    num_new: Int32[Array, " S"]  # tokens whose keys and values were computed
    sampled: Bool[Array, " S"]  # whether a token was drawn
    drawn: Sampled  # of S rows
    status: Int32[Array, " S"]  # the row's `Status` after the step
    prompt: PromptLogprobs  # of prompt tokens, where asked for
    num_waiting: Int32[Array, ""]  # rows waiting after admission
    num_free_pages: Int32[Array, ""]  # while the step ran
    num_preempted: Int32[Array, ""]  # sequences that lost their slot in this step


@record
class StepOutputs(Record):
    """What a call of `run_steps` did."""

    steps: StepOutput  # each field stacked, [n, ...]; entries from num_steps on are stale
    num_steps: Int32[Array, ""]
    status: Int32[Array, " Q"]  # a `Status` per row, after the last step
    generation: Int32[Array, " Q"]
    num_preemptions: Int32[Array, " Q"]
    num_free_pages: Int32[Array, ""]  # after the last step


@record
class RunResults(Record):
    """What `run` generated, one row per queue row; entries beyond `num_generated` are stale."""

    token_ids: Int32[Array, "Q max_new"]
    logprobs: Float32[Array, "Q max_new"]  # of token_ids, raw distribution
    num_generated: Int32[Array, " Q"]
    status: Int32[Array, " Q"]  # a `Status`
    top_ids: Int32[Array, "Q max_new K"]
    top_logprobs: Float32[Array, "Q max_new K"]
    prompt_logprobs: Float32[Array, "Q M_or_0"]  # of prompt tokens by position; NaN: the first, or not asked for
    num_steps: Int32[Array, ""]


def step(
    params: nnx.State,
    state: EngineState,
    *,
    model: ModelConfig,
    config: EngineConfig,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, StepOutput]:
    """One iteration: abort, admit, plan, forward, sample, retire.

    Args:
      params: `nnx.split(Transformer(model))[1]`; may be new ones on each call. In a loop of one's own best prepared before it
        (`prepare`): else each call does that.
      state: what the previous step returned; may be donated.
      model: static.
      config: static.
      logits_fn: static; changes the logits that tokens are drawn from.

    Raises:
      ValueError: while tracing, if the state was made with another configuration.
    """
    _check_shapes(state, config)
    params = prepare(params, model, config.backend, config.weight_dtype)
    num_preempted = jnp.sum(state.queue.num_preemptions, dtype=jnp.int32)
    state, plan = schedule(state, config=config)
    state = state.replace(pool=copy_pages(state.pool, plan.copy_from, plan.copy_to))
    sampled = samples(state, plan.num_new)
    pool, found = forward_batch(params, state, plan, model=model, config=config)
    state = count_tokens(state, sampled)
    aux, drawn = _sample(params, state, found.hidden, sampled, logits_fn, model=model, config=config)
    before, state = state, state.replace(aux=aux)
    state = finish_step(state.replace(pool=pool), plan.num_new, drawn.token, drawn.failed)
    output = StepOutput(
        row_id=before.slots.row_id,
        num_new=plan.num_new,
        sampled=sampled & ~drawn.failed,
        drawn=drawn,
        status=state.queue.status.at[before.slots.row_id].get(mode="fill", fill_value=Status.FREE),
        prompt=found.prompt,
        num_waiting=jnp.sum(before.queue.status == Status.WAITING, dtype=jnp.int32),
        num_free_pages=before.table.num_free,
        num_preempted=jnp.sum(before.queue.num_preemptions, dtype=jnp.int32) - num_preempted,
    )
    return state, output


def run_steps(
    params: nnx.State,
    state: EngineState,
    num_steps: Int32[Array, ""],
    *,
    model: ModelConfig,
    config: EngineConfig,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, StepOutputs]:
    """Up to `num_steps` iterations; fewer when nothing is left, or when a row has finished and none waits for its slot.

    Args:
      num_steps: at most `config.max_steps_per_call`; a larger number counts as that.
    """
    params = prepare(params, model, config.backend, config.weight_dtype)
    capacity = config.max_steps_per_call
    ring = empty_outputs(capacity, config).steps
    limit = jnp.minimum(num_steps, capacity)

    def go_on(carry: tuple[EngineState, StepOutput, Array, Array]) -> Bool[Array, ""]:
        state, _, index, host_wanted = carry
        return (index < limit) & ~host_wanted & has_work(state)

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
    params: nnx.State,
    state: EngineState,
    *,
    model: ModelConfig,
    config: EngineConfig,
    max_new_tokens: int,
    num_top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    logits_fn: LogitsFn | None = None,
) -> tuple[EngineState, RunResults]:
    """Iterates until every submitted sequence has finished: one compiled loop, nothing leaves the device in between.

    Args:
      max_new_tokens: columns of the results; tokens of a sequence beyond it are generated but not reported.
      num_top_logprobs: K of the results, at most `config.max_logprobs`; filled for rows that ask for logprobs.
      prompt_logprobs: whether the results have those of prompts; filled for rows that ask for them.
      logits_fn: as in `step`.

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
    kept = (
        jnp.zeros(shape, jnp.float32),
        jnp.full((*shape, num_top_logprobs), -1, jnp.int32),
        jnp.zeros((*shape, num_top_logprobs), jnp.float32),
    )
    of_prompt = jnp.full((queue_size, config.max_sequence_len if prompt_logprobs else 0), jnp.nan, jnp.float32)

    def one_step(carry: tuple[EngineState, tuple[Array, ...], Array]) -> tuple[EngineState, tuple[Array, ...], Array]:
        state, (*kept, of_prompt), index = carry
        state, output = step(params, state, model=model, config=config, logits_fn=logits_fn)
        row = jnp.where(output.sampled, output.row_id, queue_size)
        column = (state.queue.num_tokens - state.queue.prompt_length).at[row].get(mode="fill", fill_value=0) - 1
        new = (
            output.drawn.logprob,
            output.drawn.top_ids[:, :num_top_logprobs],
            output.drawn.top_logprobs[:, :num_top_logprobs],
        )
        kept = [old.at[row, column].set(value, mode="drop") for old, value in zip(kept, new, strict=True)]
        prompt = output.prompt
        of_prompt = of_prompt.at[prompt.row_id, prompt.position].set(prompt.logprob, mode="drop")
        return state, (*kept, of_prompt), index + 1

    start = (state, (*kept, of_prompt), jnp.int32(0))
    state, kept, num_steps = lax.while_loop(lambda carry: has_work(carry[0]), one_step, start)
    queue = state.queue
    columns = queue.prompt_length[:, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
    return state, RunResults(
        token_ids=jnp.take_along_axis(queue.tokens, columns, axis=1, mode="clip"),
        logprobs=kept[0],
        num_generated=queue.num_tokens - queue.prompt_length,
        status=queue.status,
        top_ids=kept[1],
        top_logprobs=kept[2],
        prompt_logprobs=kept[3],
        num_steps=num_steps,
    )


def _check_shapes(state: EngineState, config: EngineConfig) -> None:
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
    for name, (actual, wanted) in shapes.items():
        if actual != wanted:
            raise ValueError(
                f"the state was made for {name}={actual}, but config has {wanted}: use one config for both"
            )


def _num_finished(state: EngineState) -> Int32[Array, ""]:
    return jnp.sum(state.queue.status >= Status.STOP, dtype=jnp.int32)


def has_work(state: EngineState) -> Bool[Array, ""]:
    """Whether any row waits or runs."""
    return jnp.any((state.queue.status == Status.WAITING) | (state.queue.status == Status.RUNNING))


def empty_outputs(num_steps: int, config: EngineConfig) -> StepOutputs:
    """Room for the outputs of `num_steps` steps."""

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: zeros(num_steps, *leaf.shape, dtype=leaf.dtype), tree)

    slots, rows = config.max_slots, config.queue_size
    steps = StepOutput(
        row_id=zeros(num_steps, slots),
        num_new=zeros(num_steps, slots),
        sampled=zeros(num_steps, slots, dtype=bool),
        drawn=stacked(_nothing_drawn(config)),
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


def _nothing_drawn(config: EngineConfig) -> Sampled:
    slots, tops = config.max_slots, config.max_logprobs
    return Sampled(
        token=jnp.zeros((slots,), jnp.int32),
        logprob=jnp.zeros((slots,), jnp.float32),
        rank=jnp.zeros((slots,), jnp.int32),
        top_ids=jnp.full((slots, tops), -1, jnp.int32),
        top_logprobs=jnp.zeros((slots, tops), jnp.float32),
        failed=jnp.zeros((slots,), bool),
    )


def _sample(
    params: nnx.State,
    state: EngineState,
    hidden: Float32[Array, "S E"],
    sampled: Bool[Array, " S"],
    logits_fn: LogitsFn | None,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> tuple[Any, Sampled]:
    """Output projection and sampling, in tiles of slots that sample: logits of one tile only are alive."""
    num_slots, size = hidden.shape[0], config.tile_size
    forward = nnx.merge(graphdef_of(model), params)
    (order,) = jnp.nonzero(sampled, size=-(-num_slots // size) * size, fill_value=num_slots)
    num_sampling = jnp.sum(sampled, dtype=jnp.int32)

    def tile(carry: tuple[Array, Any, Sampled]) -> tuple[Array, Any, Sampled]:
        start, aux, drawn = carry
        slot = lax.dynamic_slice_in_dim(order.astype(jnp.int32), start, size)
        row = state.slots.row_id.at[slot].get(mode="fill", fill_value=state.queue.status.shape[0])
        queue = state.queue
        rows, rules = jax.tree.map(lambda leaf: leaf.at[row].get(mode="clip"), (queue.sampling, queue.rules))
        context = Context(
            tokens=queue.tokens.at[row].get(mode="clip"),
            num_tokens=queue.num_tokens.at[row].get(mode="fill", fill_value=0),
            prompt_length=queue.prompt_length.at[row].get(mode="fill", fill_value=0),
            stop_token_ids=queue.stop_token_ids.at[row].get(mode="fill", fill_value=-1),
            slot=slot,
            seen=state.seen,
        )
        num_left = jnp.minimum(num_sampling - start, size)
        logits = forward.logits(hidden.at[slot].get(mode="fill", fill_value=0), num_left)
        active, changed = slot < num_slots, None
        if logits_fn is not None:
            known = jax.tree.map(lambda leaf: leaf.at[row].get(mode="clip"), aux)
            known, changed = logits_fn(known, logit_rules.apply(logits, rules, context, active), context)
            aux = jax.tree.map(lambda old, leaf: old.at[row].set(leaf, mode="drop"), aux, known)
        options: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": config.backend == "native"}
        new = sample(logits, rows, rules, context, active, changed=changed, **options)
        return start + size, aux, jax.tree.map(lambda old, leaf: old.at[slot].set(leaf, mode="drop"), drawn, new)

    start = (jnp.int32(0), state.aux, _nothing_drawn(config))
    return lax.while_loop(lambda carry: carry[0] < num_sampling, tile, start)[1:]


@record
class Changes(Record):
    """What a host wants done between two calls."""

    submission: Submission
    collected: Bool[Array, " Q"]
    aborted: Bool[Array, " Q"]
    generation: Int32[Array, " Q"]  # of the rows collected and aborted


def update(
    state: EngineState, changes: Changes, *, model: ModelConfig, config: EngineConfig
) -> tuple[EngineState, Handles]:
    """Collects, aborts, submits: all that a host does to the state, in one call."""
    state = collect(state, changes.collected, changes.generation)
    state = abort(state, changes.aborted, changes.generation)
    return submit(state, changes.submission, model=model, config=config)


# Loops in CUDA graphs: without WHILE every loop of a step is driven by the host, which reads each condition back. The list
# replaces XLA's own, so it names that too. XLA leaves loops out where the driver is older than CUDA 12.3.
GPU_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
}


def compiler_options(config: EngineConfig) -> dict[str, Any] | None:
    """What the programs of a configuration are compiled with."""
    return GPU_COMPILER_OPTIONS if compiles_for_cuda(config.backend) else None


@functools.cache
def programs(
    model: ModelConfig, config: EngineConfig, logits_fn: LogitsFn | None = None
) -> dict[str, Callable[..., Any]]:
    """The compiled programs of an engine, by name: `step`, `run_steps` and `update`. The state is donated to each.

    On NVIDIA GPUs each is compiled with `GPU_COMPILER_OPTIONS`, as a caller's own `jax.jit` of `run` should be.
    """
    options = compiler_options(config)
    static: dict[str, Any] = {"model": model, "config": config}
    stepping = static | {"logits_fn": logits_fn}
    return {
        "step": jax.jit(functools.partial(step, **stepping), donate_argnums=1, compiler_options=options),
        "run_steps": jax.jit(functools.partial(run_steps, **stepping), donate_argnums=1, compiler_options=options),
        "update": jax.jit(functools.partial(update, **static), donate_argnums=0, compiler_options=options),
    }
