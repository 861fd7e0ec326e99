"""Runs the model on the batch of a plan: the cost depends on the batch rows in use, and one program serves any number of them.

Native kernels take the number of batch rows at run time, and compute each independently of the others, so the whole
batch goes through the model at once. The other backends use tiles of a fixed size. The plain backend attends for each
batch row on its own, so a tile may hold any of them. The kernels for accelerators serve either chunks or single tokens, and
round differently, so the batch is split by kernel, chunks first: single tokens may need their pages.

    plan      slot     = [0 1 2 5 5 5 4 4 -]      slots 0, 1, 2 decode; 5 and 4 prefill
    split     slot     = [5 5 5 4 4 0 1 2 -]      num_chunk_rows = 5

If `deterministic`, the kernel of a token depends on nothing but its request and position. Generated tokens then always go
through the kernel for single tokens: a sequence that resumes after preemption recomputes them, many at once, as it computed
them first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import KVPool
from jaxserve.core.cache.attention import BatchLayout
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.core.run_model import TokenBatch, in_tiles, run_model
from jaxserve.core.sampling import token_logprobs
from jaxserve.core.scheduler.state import EngineState
from jaxserve.core.scheduler.transitions import Plan
from jaxserve.models import ModelConfig
from jaxserve.models.bind import BoundModel, bind
from jaxserve.models.prepare import Params


@record
class SplitBatch(Record):
    """The batch of a step, tokens of chunks before single ones, each part in its old order."""

    slot: Int32[Array, " B"]  # S = none
    position: Int32[Array, " B"]
    num_chunk_rows: Int32[Array, ""]
    batch_size: Int32[Array, ""]


def split_by_kernel(state: EngineState, plan: Plan, *, config: EngineConfig) -> SplitBatch:
    """Reorders the batch of a plan by the kernel that each token needs."""
    num_slots, max_batch_size = state.slots.row_id.shape[0], plan.slot.shape[0]
    if config.deterministic:
        row = _rows_of(state, plan.slot)
        single = plan.position >= state.queue.prompt_length.at[row].get(mode="fill", fill_value=0)
    else:
        single = plan.num_new.at[plan.slot].get(mode="fill", fill_value=0) == 1
    used = plan.slot < num_slots
    in_chunk = used & ~single
    num_chunk_rows = jnp.sum(in_chunk, dtype=jnp.int32)
    before = jnp.cumsum(jnp.stack([in_chunk, used & single]).astype(jnp.int32), axis=1, dtype=jnp.int32) - 1
    place = jnp.where(in_chunk, before[0], jnp.where(used, num_chunk_rows + before[1], max_batch_size))
    return SplitBatch(
        slot=jnp.full_like(plan.slot, num_slots).at[place].set(plan.slot, mode="drop"),
        position=jnp.zeros_like(plan.position).at[place].set(plan.position, mode="drop"),
        num_chunk_rows=num_chunk_rows,
        batch_size=plan.batch_size,
    )


@record
class PromptLogprobs(Record):
    """Raw log probabilities of prompt tokens, one entry per batch row of the forward pass."""

    row_id: Int32[Array, " B"]  # queue row; Q = none: the entry is empty
    position: Int32[Array, " B"]  # position of the token in its prompt, from 1 on
    logprob: Float32[Array, " B"]  # log probability of the token, given the tokens before it
    rank: Int32[Array, " B"]  # rank of the token, 1 = most likely
    top_ids: Int32[Array, "B K"]  # most likely tokens, most likely first; -1: none
    top_logprobs: Float32[Array, "B K"]


@record
class ForwardOutput(Record):
    """The results of the forward pass that a step needs, besides the pages."""

    hidden: Float32[Array, "S E"]  # final hidden state of each slot's latest token, if that is in the batch; else 0
    prompt: PromptLogprobs


def no_prompt_logprobs(config: EngineConfig) -> PromptLogprobs:
    """Returns empty entries for the batch of one step."""
    size, tops = config.max_batch_size, config.max_logprobs
    return PromptLogprobs(
        row_id=jnp.full((size,), config.queue_size, jnp.int32),
        position=jnp.zeros((size,), jnp.int32),
        logprob=jnp.zeros((size,), jnp.float32),
        rank=jnp.zeros((size,), jnp.int32),
        top_ids=jnp.full((size, tops), -1, jnp.int32),
        top_logprobs=jnp.zeros((size, tops), jnp.float32),
    )


class _Part(NamedTuple):
    """Consecutive batch rows that one kernel serves, and the tiles that they go through."""

    slot: Int32[Array, " B"]
    position: Int32[Array, " B"]
    start: Int32[Array, ""]
    end: Int32[Array, ""]
    layout: BatchLayout
    tile_sizes: tuple[int, ...]


def forward_batch(
    params: Params, state: EngineState, plan: Plan, *, model: ModelConfig, config: EngineConfig
) -> tuple[KVPool, ForwardOutput]:
    """Runs the model on the batch of the plan. Returns the new pool, and the results that the step needs.

    Args:
      params: as in `step`, prepared.
      state: in which every batch row's slot has the page that it writes to.
      plan: the batch.
      model, config: static.
    """
    hidden = jnp.zeros((state.slots.row_id.shape[0], model.embed_dim), jnp.float32)
    output = ForwardOutput(hidden=hidden, prompt=no_prompt_logprobs(config))
    bound, none = bind(params, model), jnp.int32(0)
    if config.backend == "native":
        return _all_at_once(bound, state, plan, output, model=model, config=config)
    if config.backend == "reference":
        parts = [_Part(plan.slot, plan.position, none, plan.batch_size, BatchLayout.SINGLE, config.tile_sizes)]
    else:
        split = split_by_kernel(state, plan, config=config)
        batch, middle, end = (split.slot, split.position), split.num_chunk_rows, split.batch_size
        parts = [
            _Part(*batch, none, middle, BatchLayout.CHUNKS, config.tile_sizes),
            _Part(*batch, middle, end, BatchLayout.SINGLE, config.tile_sizes[-1:]),
        ]
    pool = state.pool
    for part in parts:
        pool, output = _by_tiles(bound, state, part, pool, output, model=model, config=config)
    return pool, output


def _all_at_once(
    bound: BoundModel,
    state: EngineState,
    plan: Plan,
    output: ForwardOutput,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> tuple[KVPool, ForwardOutput]:
    """Runs the whole batch in one call, of which native kernels compute the batch rows in use. Only logits go by tiles."""
    batch, cache = _tokens_of(state, plan.slot, plan.position), (state.table, state.pool)
    options: dict[str, Any] = {"model": model, "config": config, "batch_size": plan.batch_size}
    out, pool, hidden = run_model(bound, batch, cache, output.hidden, BatchLayout.SINGLE, **options)

    def tile(size: int, first: Int32[Array, ""], prompt: PromptLogprobs) -> PromptLogprobs:
        index = first + jnp.arange(size, dtype=jnp.int32)
        hidden_states, tokens = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size), (out, batch))
        return _add_prompt_logprobs(prompt, hidden_states, tokens, index, bound, state, config)

    prompt = in_tiles(tile, output.prompt, jnp.int32(0), plan.batch_size, (config.tile_size,))
    return pool, ForwardOutput(hidden=hidden, prompt=prompt)


def _by_tiles(
    bound: BoundModel,
    state: EngineState,
    part: _Part,
    pool: KVPool,
    output: ForwardOutput,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> tuple[KVPool, ForwardOutput]:
    """Runs the batch rows of a part tile by tile; later tiles see the pages of earlier ones."""
    num_slots, widest = state.slots.row_id.shape[0], part.tile_sizes[0]
    slots = jnp.pad(part.slot, (0, widest), constant_values=num_slots)  # a tile may start anywhere
    positions = jnp.pad(part.position, (0, widest))

    def tile(size: int, first: Int32[Array, ""], carry: tuple[KVPool, ForwardOutput]) -> tuple[KVPool, ForwardOutput]:
        pool, output = carry
        index = first + jnp.arange(size, dtype=jnp.int32)
        slot = jnp.where(index < part.end, lax.dynamic_slice_in_dim(slots, first, size), num_slots)
        batch = _tokens_of(state, slot, lax.dynamic_slice_in_dim(positions, first, size))
        options: dict[str, Any] = {"model": model, "config": config}
        out, pool, hidden = run_model(bound, batch, (state.table, pool), output.hidden, part.layout, **options)
        prompt = _add_prompt_logprobs(output.prompt, out, batch, index, bound, state, config)
        return pool, ForwardOutput(hidden=hidden, prompt=prompt)

    return in_tiles(tile, (pool, output), part.start, part.end, part.tile_sizes)


def _tokens_of(state: EngineState, slot: Int32[Array, " B"], position: Int32[Array, " B"]) -> TokenBatch:
    """Looks up the tokens of the slots' sequences."""
    row = _rows_of(state, slot)
    return TokenBatch(
        slot=slot,
        position=position,
        token=state.queue.tokens.at[row, position].get(mode="fill", fill_value=0),
        is_last=position + 1 == state.queue.num_tokens.at[row].get(mode="fill", fill_value=0),
    )


def _rows_of(state: EngineState, slot: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Returns the queue row in each batch row's slot; Q = none."""
    return state.slots.row_id.at[slot].get(mode="fill", fill_value=state.queue.status.shape[0])


def _add_prompt_logprobs(
    prompt: PromptLogprobs,
    out: Float32[Array, "R E"],
    batch: TokenBatch,
    index: Int32[Array, " R"],
    bound: BoundModel,
    state: EngineState,
    config: EngineConfig,
) -> PromptLogprobs:
    """Adds the log probabilities of prompt tokens at batch rows `index`, one tile; only this tile's logits are alive.

    Each batch row gives the distribution of the token after its own.
    """
    queue, row, position = state.queue, _rows_of(state, batch.slot), batch.position + 1
    in_prompt = position < queue.prompt_length.at[row].get(mode="fill", fill_value=0)
    num_logprobs = queue.num_prompt_logprobs.at[row].get(mode="fill", fill_value=-1)
    num_logprobs = jnp.where(in_prompt, num_logprobs, -1)

    def add(prompt: PromptLogprobs, out: Float32[Array, "R E"]) -> PromptLogprobs:
        token = queue.tokens.at[row, position].get(mode="fill", fill_value=0)
        options: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": config.backend == "native"}
        logprobs = token_logprobs(bound.logits(out), token, num_logprobs, **options)
        new = PromptLogprobs(jnp.where(num_logprobs >= 0, row, queue.status.shape[0]), position, *logprobs)
        return jax.tree.map(lambda old, leaf: old.at[index].set(leaf, mode="drop"), prompt, new)

    return if_any(num_logprobs >= 0, add, prompt, out)
