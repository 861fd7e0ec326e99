"""The model on the rows of a plan, in tiles: the cost follows the rows in use, and one program serves any number of them.

The plain backend attends row by row, so a tile may hold any rows. The kernels of other backends are made for chunks or for
single rows, and round differently; so there the rows are parted, and chunks go first: single rows may need their pages.

    plan      slot     = [0 1 2 5 5 5 4 4 -]      slots 0, 1, 2 decode; 5 and 4 prefill
    parted    slot     = [5 5 5 4 4 0 1 2 -]      num_chunk_rows = 5

If `deterministic`, a row's kernel must depend on nothing but its request and position. So generated tokens always are single
rows: a sequence that resumes after preemption recomputes them as it computed them first, many at once.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.cache import KVPool
from jaxserve.cache.attention import Rows, paged_attend
from jaxserve.config import EngineConfig
from jaxserve.models import ModelConfig, graphdef_of
from jaxserve.pytree import Record, record
from jaxserve.scheduler.state import EngineState
from jaxserve.scheduler.transitions import Plan


@record
class PartedRows(Record):
    """Rows of a step, those of chunks before single ones, each part in its old order."""

    slot: Int32[Array, " B"]  # S = none
    position: Int32[Array, " B"]
    num_chunk_rows: Int32[Array, ""]
    num_rows: Int32[Array, ""]


def part(state: EngineState, plan: Plan, *, config: EngineConfig) -> PartedRows:
    """Parts the rows of a plan by the kernel that they need."""
    num_slots, num_rows = state.slots.row_id.shape[0], plan.slot.shape[0]
    row = state.slots.row_id.at[plan.slot].get(mode="fill", fill_value=state.queue.status.shape[0])
    if config.deterministic:
        single = plan.position >= state.queue.prompt_length.at[row].get(mode="fill", fill_value=0)
    else:
        single = plan.num_new.at[plan.slot].get(mode="fill", fill_value=0) == 1
    used = plan.slot < num_slots
    in_chunk = used & ~single
    num_chunk_rows = jnp.sum(in_chunk, dtype=jnp.int32)
    before = jnp.cumsum(jnp.stack([in_chunk, used & single]).astype(jnp.int32), axis=1, dtype=jnp.int32) - 1
    place = jnp.where(in_chunk, before[0], jnp.where(used, num_chunk_rows + before[1], num_rows))
    return PartedRows(
        slot=jnp.full_like(plan.slot, num_slots).at[place].set(plan.slot, mode="drop"),
        position=jnp.zeros_like(plan.position).at[place].set(plan.position, mode="drop"),
        num_chunk_rows=num_chunk_rows,
        num_rows=plan.num_rows,
    )


def forward_rows(
    params: nnx.State, state: EngineState, plan: Plan, *, model: ModelConfig, config: EngineConfig
) -> tuple[KVPool, Float32[Array, "S E"]]:
    """The model on the rows of the plan, tile by tile; later tiles see the pages that earlier ones wrote.

    Returns:
      The pool, and per slot the hidden state of its last known token, if that is among the rows.
    """
    hidden = jnp.zeros((state.slots.row_id.shape[0], model.embed_dim), jnp.float32)
    run = functools.partial(_tiles, params, state, model=model, config=config)
    if config.backend == "reference":
        rows = (plan.slot, plan.position, jnp.int32(0), plan.num_rows)
        return run(rows, Rows.SINGLE, config.tile_sizes, state.pool, hidden)
    parted = part(state, plan, config=config)
    chunks = (parted.slot, parted.position, jnp.int32(0), parted.num_chunk_rows)
    pool, hidden = run(chunks, Rows.CHUNKS, config.tile_sizes, state.pool, hidden)
    single = (parted.slot, parted.position, parted.num_chunk_rows, parted.num_rows)
    return run(single, Rows.SINGLE, config.tile_sizes[-1:], pool, hidden)


def _tiles(
    params: nnx.State,
    state: EngineState,
    rows: tuple[Int32[Array, " B"], Int32[Array, " B"], Int32[Array, ""], Int32[Array, ""]],
    kind: Rows,
    sizes: tuple[int, ...],
    pool: KVPool,
    hidden: Float32[Array, "S E"],
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> tuple[KVPool, Float32[Array, "S E"]]:
    """Rows from `start` to `end` of (slot, position, start, end), in tiles of `sizes`, the widest first."""
    slots, positions, start, end = rows
    num_slots = state.slots.row_id.shape[0]
    padding = (0, sizes[0])  # a tile may start anywhere
    slots = jnp.pad(slots, padding, constant_values=num_slots)
    positions = jnp.pad(positions, padding)
    forward = nnx.merge(graphdef_of(model), params)

    def tile(size: int, carry: tuple[Array, KVPool, Array]) -> tuple[Array, KVPool, Array]:
        first, pool, hidden = carry
        slot = lax.dynamic_slice_in_dim(slots, first, size)
        slot = jnp.where(first + jnp.arange(size, dtype=jnp.int32) < end, slot, num_slots)
        position = lax.dynamic_slice_in_dim(positions, first, size)
        row = state.slots.row_id.at[slot].get(mode="fill", fill_value=state.queue.status.shape[0])
        tokens = state.queue.tokens.at[row, position].get(mode="fill", fill_value=0)
        attend = paged_attend(
            state.table.page_ids,
            slot,
            position,
            kind,
            group_size=model.group_size,
            backend=config.backend,
            interpret=config.interpret_kernels,
        )
        out, pages = forward(tokens, position, attend=attend, kv=tuple(zip(pool.k, pool.v, strict=True)))
        last = position + 1 == state.queue.num_tokens.at[row].get(mode="fill", fill_value=0)
        hidden = hidden.at[jnp.where(last, slot, num_slots)].set(out, mode="drop")
        k, v = zip(*pages, strict=True)
        return first + size, KVPool(k=k, v=v), hidden

    carry = (start, pool, hidden)
    for size in sizes:
        smallest = 0 if size == sizes[-1] else size - 1
        carry = lax.while_loop(
            lambda carry, smallest=smallest: end - carry[0] > smallest, functools.partial(tile, size), carry
        )
    return carry[1], carry[2]
