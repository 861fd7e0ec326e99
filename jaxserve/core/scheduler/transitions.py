"""The transitions of a step on the state, apart from the model: pure functions, composed in `jaxserve.core.step`.

schedule: apply_aborts -> admit -> secure_pages -> plan    (forward, sample)    finish_step: advance -> retire
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache.page_table import allocate, allocate_each, release, release_each, share
from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler import policy
from jaxserve.core.scheduler.forks import Start, start_of
from jaxserve.core.scheduler.state import EngineState, Queue, Status


@record
class Plan(Record):
    """The rows of one step: decode rows first, then prefill chunks, packed without gaps."""

    slot: Int32[Array, " B"]  # slot of each row; S = none, beyond the batch
    position: Int32[Array, " B"]  # of the row's token in its sequence; 0 beyond the batch
    batch_size: Int32[Array, ""]
    num_new: Int32[Array, " S"]  # tokens this step computes per slot
    copy_from: Int32[Array, " S"]  # pages to be copied, all at once, before any row is computed
    copy_to: Int32[Array, " S"]  # for each of them the page to overwrite; N = none


def schedule(state: EngineState, *, config: EngineConfig) -> tuple[EngineState, Plan]:
    """All that precedes the model in a step."""
    state, copied_page = admit(apply_aborts(state), config=config)
    state = secure_pages(state, config=config)
    return state, plan(state, copied_page, config=config)


def finish_step(
    state: EngineState, num_new: Int32[Array, " S"], token: Int32[Array, " S"], failed: Bool[Array, " S"] | None = None
) -> EngineState:
    """All that follows the model in a step; `token` and `failed` count only for slots that sample."""
    state = state if failed is None else fail(state, failed & samples(state, num_new))
    return retire(advance(state, num_new, token))


def fail(state: EngineState, failed: Bool[Array, " S"]) -> EngineState:
    """Ends sequences for which the model gave no distribution to draw from: they get no token, and status ERROR."""
    row = jnp.where(failed, state.slots.row_id, state.queue.status.shape[0])
    status = state.queue.status.at[row].set(Status.ERROR.value, mode="drop")
    return _vacate(state.replace(queue=state.queue.replace(status=status)), failed)


def remaining(state: EngineState) -> Int32[Array, " S"]:
    """Tokens per slot whose keys and values are not in the pool; 0 for slots not in use."""
    num_tokens = state.queue.num_tokens.at[state.slots.row_id].get(mode="fill", fill_value=0)
    return jnp.where(state.active, num_tokens - state.slots.num_computed, 0)


def decoding(state: EngineState) -> Bool[Array, " S"]:
    """Slots that lack the keys and values of one token only, the latest."""
    return remaining(state) == 1


def apply_aborts(state: EngineState) -> EngineState:
    """Ends the sequences whose abort was requested; their slots and pages are free afterwards."""
    queue = state.queue
    unfinished = (queue.status == Status.WAITING) | (queue.status == Status.RUNNING)
    aborted = queue.abort_requested & unfinished
    leaving = aborted.at[state.slots.row_id].get(mode="fill", fill_value=False)
    queue = queue.replace(
        status=jnp.where(aborted, Status.ABORT.value, queue.status),
        abort_requested=jnp.zeros_like(queue.abort_requested),
    )
    return _vacate(state.replace(queue=queue), leaving)


def admit(state: EngineState, *, config: EngineConfig) -> tuple[EngineState, Int32[Array, " S"]]:
    """Moves waiting rows into free slots, in order, while the head of the queue finds a slot and its pages.

    Returns:
      The state, and per slot the page to be copied to the first page that is the slot's own; N = none.
    """

    def head(
        state: EngineState, copied_page: Int32[Array, " S"]
    ) -> tuple[Int32[Array, ""], Start, Int32[Array, ""], Bool[Array, ""]]:
        row, found = policy.next_waiting(state)
        start = start_of(state, row, copied_page, page_size=config.page_size)
        num_needed = _ceil_div(state.queue.num_tokens[row], config.page_size) - start.num_shared
        num_decoding = jnp.sum(decoding(state), dtype=jnp.int32)
        fits = policy.may_admit(state, num_needed, num_decoding)
        return row, start, num_needed, found & fits & ~start.waits & jnp.any(~state.active)

    def can_admit(state: EngineState, copied_page: Int32[Array, " S"]) -> Bool[Array, ""]:
        return head(state, copied_page)[3]

    def admit_head(state: EngineState, copied_page: Int32[Array, " S"]) -> tuple[EngineState, Int32[Array, " S"]]:
        row, start, num_needed, _ = head(state, copied_page)
        slot = jnp.argmin(state.active).astype(jnp.int32)
        table = share(state.table, start.lender, slot, start.num_shared)
        table, _ = allocate(table, slot, num_needed)
        state = state.replace(
            queue=state.queue.replace(status=state.queue.status.at[row].set(Status.RUNNING.value)),
            slots=state.slots.replace(
                row_id=state.slots.row_id.at[slot].set(row),
                num_computed=state.slots.num_computed.at[slot].set(start.num_computed),
                num_counted=state.slots.num_counted.at[slot].set(0),
            ),
            table=table,
        )
        return state, copied_page.at[slot].set(start.copied_page)

    nothing = jnp.full_like(state.slots.row_id, state.table.num_pages)
    return _loop_without_pool(can_admit, admit_head, state, nothing)


def preempt(state: EngineState, slot: Int32[Array, ""]) -> EngineState:
    """Sends the sequence in `slot` back to the queue; its keys and values are recomputed when it resumes."""
    row = state.slots.row_id[slot]
    queue = state.queue.replace(
        status=state.queue.status.at[row].set(Status.WAITING.value),
        num_preemptions=state.queue.num_preemptions.at[row].add(1),
    )
    return state.replace(
        queue=queue,
        slots=state.slots.replace(row_id=state.slots.row_id.at[slot].set(queue.status.shape[0])),
        table=release(state.table, slot),
    )


def secure_pages(state: EngineState, *, config: EngineConfig) -> EngineState:
    """Gives every decoding slot the page for its next token, preempting others when pages run out.

    Prefilling slots were given pages for all their known tokens on admission.
    """

    def wants(state: EngineState) -> tuple[Bool[Array, " S"], Int32[Array, " S"]]:
        lacks_page = _page_to_write(state, config) == state.table.num_pages
        return decoding(state) & lacks_page, state.slots.num_computed // config.page_size

    def too_few(state: EngineState) -> Bool[Array, ""]:
        return jnp.sum(wants(state)[0], dtype=jnp.int32) > state.table.num_free

    (state,) = _loop_without_pool(too_few, lambda state: (preempt(state, policy.victim(state)),), state)
    table, _ = allocate_each(state.table, *wants(state))
    return state.replace(table=table)


def plan(state: EngineState, copied_page: Int32[Array, " S"], *, config: EngineConfig) -> Plan:
    """Chooses the rows of this step: one per decoding slot, and up to `chunk_size` prefill rows, oldest first.

    Args:
      state: in which every slot has the pages that it needs.
      copied_page: as `admit` returned it. The copied page may be somebody else's by now: it is read before it is written. A
        slot that was preempted since has no page, and so nothing is written for it.
      config: static.
    """
    order = policy.service_order(state, decoding(state))
    wanted = remaining(state)[order]
    prefill = jnp.where(wanted > 1, wanted, 0)
    before = jnp.cumsum(prefill, dtype=jnp.int32) - prefill
    granted = jnp.where(wanted > 1, jnp.clip(config.chunk_size - before, 0, wanted), wanted)
    end = jnp.cumsum(granted, dtype=jnp.int32)
    row = jnp.arange(config.max_batch_size, dtype=jnp.int32)
    place = jnp.searchsorted(end, row, side="right").astype(jnp.int32)
    used = place < order.shape[0]
    slot = order.at[place].get(mode="fill", fill_value=order.shape[0])
    offset = row - (end - granted).at[place].get(mode="clip")
    first = state.slots.num_computed.at[slot].get(mode="fill", fill_value=0)
    return Plan(
        slot=slot,
        position=jnp.where(used, first + offset, 0),
        batch_size=end[-1],
        num_new=jnp.zeros_like(granted).at[order].set(granted),
        copy_from=copied_page,
        copy_to=jnp.where(copied_page < state.table.num_pages, _page_to_write(state, config), state.table.num_pages),
    )


def samples(state: EngineState, num_new: Int32[Array, " S"]) -> Bool[Array, " S"]:
    """Slots that draw a token this step: those whose last known token is among the step's rows."""
    return state.active & (num_new == remaining(state))


def advance(state: EngineState, num_new: Int32[Array, " S"], token: Int32[Array, " S"]) -> EngineState:
    """Records what the step computed: keys and values of `num_new` tokens, and one new token per sampling slot.

    A row ends here when its token is one of its stop tokens, else when it has reached its length.
    """
    queue, queue_size = state.queue, state.queue.status.shape[0]
    sampled = samples(state, num_new)
    row = jnp.where(sampled, state.slots.row_id, queue_size)
    length = queue.num_tokens.at[row].get(mode="fill", fill_value=0)
    tokens = queue.tokens.at[row, length].set(token, mode="drop")
    stop_token_ids = queue.stop_token_ids.at[row].get(mode="fill", fill_value=-1)
    stopped = jnp.any(stop_token_ids == token[:, None], axis=1) | _ends_sequence(queue, tokens, row, length + 1)
    full = length + 1 >= queue.max_length.at[row].get(mode="fill", fill_value=0)
    status = jnp.where(stopped, Status.STOP.value, jnp.where(full, Status.LENGTH.value, Status.RUNNING.value))
    queue = queue.replace(
        tokens=tokens,
        num_tokens=queue.num_tokens.at[row].add(1, mode="drop"),
        status=queue.status.at[row].set(status.astype(jnp.int32), mode="drop"),
    )
    slots = state.slots.replace(num_computed=state.slots.num_computed + num_new)
    return state.replace(queue=queue, slots=slots)


def _ends_sequence(
    queue: Queue, tokens: Int32[Array, "Q M"], row: Int32[Array, " S"], num_tokens: Int32[Array, " S"]
) -> Bool[Array, " S"]:
    """Whether what was generated ends with a stop sequence, and may end by then."""
    sequences = queue.stop_sequences.at[row].get(mode="fill", fill_value=-1)
    if not sequences.shape[1]:
        return jnp.zeros(row.shape, bool)
    start = queue.prompt_length.at[row].get(mode="fill", fill_value=0)[:, None]
    position = num_tokens[:, None] - sequences.shape[2] + jnp.arange(sequences.shape[2], dtype=jnp.int32)[None, :]
    recent = tokens.at[row[:, None], position].get(mode="fill", fill_value=-2)
    recent = jnp.where(position >= start, recent, -2)[:, None, :]
    ended = jnp.all((sequences < 0) | (sequences == recent), axis=2) & (sequences[:, :, -1] >= 0)
    min_tokens = queue.rules.min_tokens.at[row].get(mode="fill", fill_value=0)
    return jnp.any(ended, axis=1) & (num_tokens - start[:, 0] >= min_tokens)


def retire(state: EngineState) -> EngineState:
    """Frees the slots and pages of sequences that have finished."""
    status = state.queue.status.at[state.slots.row_id].get(mode="fill", fill_value=Status.FREE)
    return _vacate(state, state.active & (status >= Status.STOP))


def _vacate(state: EngineState, leaving: Bool[Array, " S"]) -> EngineState:
    queue_size = state.queue.status.shape[0]
    return state.replace(
        slots=state.slots.replace(row_id=jnp.where(leaving, queue_size, state.slots.row_id)),
        table=release_each(state.table, leaving),
    )


def _page_to_write(state: EngineState, config: EngineConfig) -> Int32[Array, " S"]:
    """The page of each slot's first token that is not computed; N = none."""
    index = state.slots.num_computed // config.page_size
    return jnp.take_along_axis(state.table.page_ids, index[:, None], axis=1, mode="clip")[:, 0]


def _loop_without_pool(
    cond: Callable[..., Bool[Array, ""]], body: Callable[..., tuple[Any, ...]], state: EngineState, *others: Array
) -> tuple[Any, ...]:
    """A while loop over (state, *others), the large arrays left out: they are not touched, nor can they be copied."""
    pool, seen, aux, tokens = state.pool, state.seen, state.aux, state.queue.tokens

    def split(state: EngineState, *others: Array) -> tuple[Any, ...]:
        return state.replace(pool=None, seen=None, aux=None, queue=state.queue.replace(tokens=None)), *others

    small, *rest = lax.while_loop(lambda carry: cond(*carry), lambda carry: split(*body(*carry)), split(state, *others))
    return small.replace(pool=pool, seen=seen, aux=aux, queue=small.queue.replace(tokens=tokens)), *rest


def _ceil_div(a: Int32[Array, ""], b: int) -> Int32[Array, ""]:
    return (a + (b - 1)) // b
