"""The model on the rows of a plan: the cost follows the rows in use, and one program serves any number of them.

Native kernels take the number of rows at run time, and compute a row in one way whatever is beside it: so all rows go at once.
The other backends go through tiles of a fixed number of rows. The plain backend attends row by row, so a tile may hold any
rows. The kernels for accelerators are made for chunks or for single rows, and round differently; so there the rows are parted,
and chunks go first: single rows may need their pages.

    plan      slot     = [0 1 2 5 5 5 4 4 -]      slots 0, 1, 2 decode; 5 and 4 prefill
    parted    slot     = [5 5 5 4 4 0 1 2 -]      num_chunk_rows = 5

If `deterministic`, a row's kernel must depend on nothing but its request and position. So generated tokens always are single
rows: a sequence that resumes after preemption recomputes them as it computed them first, many at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import KVPool
from jaxserve.core.cache.attention import BatchLayout, paged_attend
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import token_logprobs
from jaxserve.core.scheduler.state import EngineState, Queue
from jaxserve.core.scheduler.transitions import Plan
from jaxserve.models import ModelConfig, Transformer, graphdef_of


@record
class SplitBatch(Record):
    """Rows of a step, those of chunks before single ones, each part in its old order."""

    slot: Int32[Array, " B"]  # S = none
    position: Int32[Array, " B"]
    num_chunk_rows: Int32[Array, ""]
    batch_size: Int32[Array, ""]


def split_by_kernel(state: EngineState, plan: Plan, *, config: EngineConfig) -> SplitBatch:
    """Parts the rows of a plan by the kernel that they need."""
    num_slots, max_batch_size = state.slots.row_id.shape[0], plan.slot.shape[0]
    row = state.slots.row_id.at[plan.slot].get(mode="fill", fill_value=state.queue.status.shape[0])
    if config.deterministic:
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
    """Raw log probabilities of prompt tokens, one entry per row of the forward pass."""

    row_id: Int32[Array, " B"]  # queue row; Q = none: nothing was asked for here
    position: Int32[Array, " B"]  # of the token in its prompt, from 1 on
    logprob: Float32[Array, " B"]  # of the token, given those before it
    rank: Int32[Array, " B"]  # of the token, 1 = most likely
    top_ids: Int32[Array, "B K"]  # most likely tokens, first first; -1: none
    top_logprobs: Float32[Array, "B K"]


@record
class ForwardOutput(Record):
    """What the forward pass of a step is for, the pages aside."""

    hidden: Float32[Array, "S E"]  # of each slot's last known token, if that is among the rows
    prompt: PromptLogprobs


def no_prompt_logprobs(config: EngineConfig) -> PromptLogprobs:
    """Entries for the rows of one step, none of which asked for anything."""
    rows, tops = config.max_batch_size, config.max_logprobs
    return PromptLogprobs(
        row_id=jnp.full((rows,), config.queue_size, jnp.int32),
        position=jnp.zeros((rows,), jnp.int32),
        logprob=jnp.zeros((rows,), jnp.float32),
        rank=jnp.zeros((rows,), jnp.int32),
        top_ids=jnp.full((rows, tops), -1, jnp.int32),
        top_logprobs=jnp.zeros((rows, tops), jnp.float32),
    )


def forward_batch(
    params: nnx.State, state: EngineState, plan: Plan, *, model: ModelConfig, config: EngineConfig
) -> tuple[KVPool, ForwardOutput]:
    """The model on the rows of the plan; tile by tile, or natively all at once."""
    if config.backend == "native":
        return _all_rows(params, state, plan, model=model, config=config)
    hidden = jnp.zeros((state.slots.row_id.shape[0], model.embed_dim), jnp.float32)
    found = ForwardOutput(hidden=hidden, prompt=no_prompt_logprobs(config))
    run = functools.partial(_tiles, params, state, model=model, config=config)
    if config.backend == "reference":
        rows = (plan.slot, plan.position, jnp.int32(0), plan.batch_size)
        return run(rows, BatchLayout.SINGLE, config.tile_sizes, state.pool, found)
    parted = split_by_kernel(state, plan, config=config)
    chunks = (parted.slot, parted.position, jnp.int32(0), parted.num_chunk_rows)
    pool, found = run(chunks, BatchLayout.CHUNKS, config.tile_sizes, state.pool, found)
    single = (parted.slot, parted.position, parted.num_chunk_rows, parted.batch_size)
    return run(single, BatchLayout.SINGLE, config.tile_sizes[-1:], pool, found)


def _all_rows(
    params: nnx.State, state: EngineState, plan: Plan, *, model: ModelConfig, config: EngineConfig
) -> tuple[KVPool, ForwardOutput]:
    """All rows in one pass, of which native kernels do those in use."""
    queue, pool = state.queue, state.pool
    num_slots, queue_size = state.slots.row_id.shape[0], queue.status.shape[0]
    forward = nnx.merge(graphdef_of(model), params)
    row = state.slots.row_id.at[plan.slot].get(mode="fill", fill_value=queue_size)
    tokens = queue.tokens.at[row, plan.position].get(mode="fill", fill_value=0)
    attend = paged_attend(
        state.table.page_ids,
        plan.slot,
        plan.position,
        BatchLayout.SINGLE,
        group_size=model.group_size,
        backend="native",
        batch_size=plan.batch_size,
    )
    kv = tuple(zip(pool.k, pool.v, strict=True))
    out, pages = forward(tokens, plan.position, attend=attend, kv=kv)
    k, v = zip(*pages, strict=True)
    last = plan.position + 1 == queue.num_tokens.at[row].get(mode="fill", fill_value=0)
    hidden = jnp.zeros((num_slots, model.embed_dim), jnp.float32)
    hidden = hidden.at[jnp.where(last, plan.slot, num_slots)].set(out, mode="drop")

    size = config.tile_size  # logits of so many rows are alive at once

    def tile(carry: tuple[Array, PromptLogprobs]) -> tuple[Array, PromptLogprobs]:
        first, found = carry
        index = first + jnp.arange(size, dtype=jnp.int32)
        rows, ids, positions = (lax.dynamic_slice_in_dim(array, first, size) for array in (out, row, plan.position))
        return first + size, _prompt_logprobs(forward, rows, ids, positions, index, queue, found, config)

    prompt = (jnp.int32(0), no_prompt_logprobs(config))
    prompt = lax.while_loop(lambda carry: carry[0] < plan.batch_size, tile, prompt)[1]
    return KVPool(k=k, v=v), ForwardOutput(hidden=hidden, prompt=prompt)


def _tiles(
    params: nnx.State,
    state: EngineState,
    rows: tuple[Int32[Array, " B"], Int32[Array, " B"], Int32[Array, ""], Int32[Array, ""]],
    layout: BatchLayout,
    sizes: tuple[int, ...],
    pool: KVPool,
    found: ForwardOutput,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> tuple[KVPool, ForwardOutput]:
    """Rows from `start` to `end` of (slot, position, start, end), in tiles of `sizes`, the widest first."""
    slots, positions, start, end = rows
    queue = state.queue
    num_slots, queue_size = state.slots.row_id.shape[0], queue.status.shape[0]
    padding = (0, sizes[0])  # a tile may start anywhere
    slots = jnp.pad(slots, padding, constant_values=num_slots)
    positions = jnp.pad(positions, padding)
    forward = nnx.merge(graphdef_of(model), params)

    def tile(size: int, carry: tuple[Array, KVPool, ForwardOutput]) -> tuple[Array, KVPool, ForwardOutput]:
        first, pool, found = carry
        index = first + jnp.arange(size, dtype=jnp.int32)
        slot = jnp.where(index < end, lax.dynamic_slice_in_dim(slots, first, size), num_slots)
        position = lax.dynamic_slice_in_dim(positions, first, size)
        row = state.slots.row_id.at[slot].get(mode="fill", fill_value=queue_size)
        tokens = queue.tokens.at[row, position].get(mode="fill", fill_value=0)
        attend = paged_attend(
            state.table.page_ids,
            slot,
            position,
            layout,
            group_size=model.group_size,
            backend=config.backend,
            interpret=config.interpret_kernels,
        )
        out, pages = forward(tokens, position, attend=attend, kv=tuple(zip(pool.k, pool.v, strict=True)))
        last = position + 1 == queue.num_tokens.at[row].get(mode="fill", fill_value=0)
        hidden = found.hidden.at[jnp.where(last, slot, num_slots)].set(out, mode="drop")
        prompt = _prompt_logprobs(forward, out, row, position, index, queue, found.prompt, config)
        k, v = zip(*pages, strict=True)
        return first + size, KVPool(k=k, v=v), ForwardOutput(hidden=hidden, prompt=prompt)

    carry = (start, pool, found)
    for size in sizes:
        smallest = 0 if size == sizes[-1] else size - 1
        carry = lax.while_loop(
            lambda carry, smallest=smallest: end - carry[0] > smallest, functools.partial(tile, size), carry
        )
    return carry[1], carry[2]


def _prompt_logprobs(
    forward: Transformer,
    out: Float32[Array, "R E"],
    row: Int32[Array, " R"],
    position: Int32[Array, " R"],
    index: Int32[Array, " R"],
    queue: Queue,
    found: PromptLogprobs,
    config: EngineConfig,
) -> PromptLogprobs:
    """Adds a tile's rows, at `index` of all rows: each tells of the prompt token after its own. One tile's logits are alive."""
    in_prompt = position + 1 < queue.prompt_length.at[row].get(mode="fill", fill_value=0)
    asked = queue.num_prompt_logprobs.at[row].get(mode="fill", fill_value=-1)
    asked = jnp.where(in_prompt, asked, -1)

    def add(found: PromptLogprobs, out: Float32[Array, "R E"]) -> PromptLogprobs:
        token = queue.tokens.at[row, position + 1].get(mode="fill", fill_value=0)
        options: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": config.backend == "native"}
        logprobs = token_logprobs(forward.logits(out), token, asked, **options)
        new = PromptLogprobs(jnp.where(asked >= 0, row, queue.status.shape[0]), position + 1, *logprobs)
        return jax.tree.map(lambda old, leaf: old.at[index].set(leaf, mode="drop"), found, new)

    return if_any(asked >= 0, add, found, out)
