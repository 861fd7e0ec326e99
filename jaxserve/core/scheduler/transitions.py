"""The transitions of a step on the state, apart from the model: pure functions, composed in `jaxserve.core.step`.

schedule: apply_aborts -> admit -> secure_pages -> plan    (forward, sample)    finish_step: advance -> retire
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import PageTable
from jaxserve.core.cache.page_table import allocate, allocate_each, release, release_each, share
from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler import policy
from jaxserve.core.scheduler.forks import Start, start_of
from jaxserve.core.scheduler.state import EngineState, Queue, Slots, Status


@record
class Plan(Record):
    """The batch of one step: one token per decoding slot, then chunks of prompts, packed without gaps."""

    slot: Int32[Array, " B"]  # slot of each batch row; S = none, beyond the batch
    position: Int32[Array, " B"]  # position of the token in its sequence; 0 beyond the batch
    batch_size: Int32[Array, ""]  # batch rows in use
    num_new: Int32[Array, " S"]  # tokens of each slot whose keys and values this step computes
    copy_from: Int32[Array, " S"]  # pages to copy, all at once, before the model runs
    copy_to: Int32[Array, " S"]  # for each of them the page to overwrite; N = none


@record
class Occupancy(Record):
    """The sequences in the slots and their pages: everything that admission and preemption change.

    Their loops carry this record and read the rest of the state from outside of the loop, so no loop can copy the KV pool.
    """

    status: Int32[Array, " Q"]  # a `Status`, as in `Queue`
    num_preemptions: Int32[Array, " Q"]  # as in `Queue`
    slots: Slots
    table: PageTable


def occupancy_of(state: EngineState) -> Occupancy:
    """Returns the part of a state that admission and preemption change."""
    queue = state.queue
    return Occupancy(status=queue.status, num_preemptions=queue.num_preemptions, slots=state.slots, table=state.table)


def with_occupancy(state: EngineState, occupancy: Occupancy) -> EngineState:
    """Returns the state with the part replaced that admission and preemption change."""
    queue = state.queue.replace(status=occupancy.status, num_preemptions=occupancy.num_preemptions)
    return state.replace(queue=queue, slots=occupancy.slots, table=occupancy.table)


def schedule(state: EngineState, *, config: EngineConfig) -> tuple[EngineState, Plan]:
    """Does everything in a step that precedes the model: aborts, admission, pages, and the plan."""
    state, copied_page = admit(apply_aborts(state), config=config)
    state = secure_pages(state, config=config)
    return state, plan(state, copied_page, config=config)


def finish_step(
    state: EngineState, num_new: Int32[Array, " S"], token: Int32[Array, " S"], failed: Bool[Array, " S"] | None = None
) -> EngineState:
    """Does everything in a step that follows the model: records the tokens, and retires the sequences that have finished.

    Args:
      state: the state after `schedule`, with the new keys and values.
      num_new: as in `Plan`.
      token: the token that each slot drew; entries of slots that do not sample mean nothing.
      failed: slots for which there was no distribution to draw from; None: none. Entries of slots that do not sample mean
        nothing.
    """
    state = state if failed is None else fail(state, failed & samples(state, num_new))
    return retire(advance(state, num_new, token))


def fail(state: EngineState, failed: Bool[Array, " S"]) -> EngineState:
    """Ends with status ERROR, and without a token, the sequences for which there was no distribution to draw from."""
    row = jnp.where(failed, state.slots.row_id, state.queue.status.shape[0])
    status = state.queue.status.at[row].set(Status.ERROR.value, mode="drop")
    return _vacate(state.replace(queue=state.queue.replace(status=status)), failed)


def remaining(state: EngineState) -> Int32[Array, " S"]:
    """Returns how many tokens of each slot have no keys and values in the pool; 0 for slots not in use."""
    num_tokens = state.queue.num_tokens.at[state.slots.row_id].get(mode="fill", fill_value=0)
    return jnp.where(state.active, num_tokens - state.slots.num_computed, 0)


def decoding(state: EngineState) -> Bool[Array, " S"]:
    """Returns the slots that lack only the keys and values of their latest token."""
    return remaining(state) == 1


def apply_aborts(state: EngineState) -> EngineState:
    """Ends the sequences whose abort was requested, and frees their slots and pages."""
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
        row, any_waits = policy.next_waiting(state)
        start = start_of(state, row, copied_page, page_size=config.page_size)
        num_needed = _ceil_div(state.queue.num_tokens[row], config.page_size) - start.num_shared
        num_decoding = jnp.sum(decoding(state), dtype=jnp.int32)
        fits = policy.may_admit(state, num_needed, num_decoding)
        return row, start, num_needed, any_waits & fits & ~start.waits & jnp.any(~state.active)

    def can_admit(carry: tuple[Occupancy, Int32[Array, " S"]]) -> Bool[Array, ""]:
        occupancy, copied_page = carry
        return head(with_occupancy(state, occupancy), copied_page)[3]

    def admit_head(carry: tuple[Occupancy, Int32[Array, " S"]]) -> tuple[Occupancy, Int32[Array, " S"]]:
        occupancy, copied_page = carry
        now = with_occupancy(state, occupancy)
        row, start, num_needed, _ = head(now, copied_page)
        slot = jnp.argmin(now.active).astype(jnp.int32)
        table = share(now.table, start.lender, slot, start.num_shared)
        table, _ = allocate(table, slot, num_needed)
        occupancy = occupancy.replace(
            status=occupancy.status.at[row].set(Status.RUNNING.value),
            slots=Slots(
                row_id=now.slots.row_id.at[slot].set(row),
                num_computed=now.slots.num_computed.at[slot].set(start.num_computed),
                num_counted=now.slots.num_counted.at[slot].set(0),
            ),
            table=table,
        )
        return occupancy, copied_page.at[slot].set(start.copied_page)

    no_page = jnp.full_like(state.slots.row_id, state.table.num_pages)
    occupancy, copied_page = lax.while_loop(can_admit, admit_head, (occupancy_of(state), no_page))
    return with_occupancy(state, occupancy), copied_page


def preempt(occupancy: Occupancy, slot: Int32[Array, ""]) -> Occupancy:
    """Sends the sequence in `slot` back to the queue; its keys and values are recomputed when it resumes."""
    row, queue_size = occupancy.slots.row_id[slot], occupancy.status.shape[0]
    return Occupancy(
        status=occupancy.status.at[row].set(Status.WAITING.value),
        num_preemptions=occupancy.num_preemptions.at[row].add(1),
        slots=occupancy.slots.replace(row_id=occupancy.slots.row_id.at[slot].set(queue_size)),
        table=release(occupancy.table, slot),
    )


def secure_pages(state: EngineState, *, config: EngineConfig) -> EngineState:
    """Gives every decoding slot the page for its next token, preempting others when pages run out.

    Prefilling slots were given pages for all their known tokens on admission.
    """

    def wants(state: EngineState) -> tuple[Bool[Array, " S"], Int32[Array, " S"]]:
        lacks_page = _page_to_write(state, config) == state.table.num_pages
        return decoding(state) & lacks_page, state.slots.num_computed // config.page_size

    def too_few(occupancy: Occupancy) -> Bool[Array, ""]:
        now = with_occupancy(state, occupancy)
        return jnp.sum(wants(now)[0], dtype=jnp.int32) > now.table.num_free

    def preempt_one(occupancy: Occupancy) -> Occupancy:
        return preempt(occupancy, policy.victim(with_occupancy(state, occupancy)))

    state = with_occupancy(state, lax.while_loop(too_few, preempt_one, occupancy_of(state)))
    table, _ = allocate_each(state.table, *wants(state))
    return state.replace(table=table)


def plan(state: EngineState, copied_page: Int32[Array, " S"], *, config: EngineConfig) -> Plan:
    """Chooses the batch of this step: one token per decoding slot, and up to `chunk_size` prompt tokens, oldest slots first.

    Args:
      state: in which every slot has the pages that it needs.
      copied_page: as `admit` returned it. The source page may have been reassigned since; all copies read before any write.
        A slot that was preempted since has no page, so nothing is copied for it.
      config: static.
    """
    order = policy.service_order(state, decoding(state))
    num_left = remaining(state)[order]
    prefill = jnp.where(num_left > 1, num_left, 0)
    before = jnp.cumsum(prefill, dtype=jnp.int32) - prefill
    num_new = jnp.where(num_left > 1, jnp.clip(config.chunk_size - before, 0, num_left), num_left)
    end = jnp.cumsum(num_new, dtype=jnp.int32)
    batch_row = jnp.arange(config.max_batch_size, dtype=jnp.int32)
    place = jnp.searchsorted(end, batch_row, side="right").astype(jnp.int32)
    used = place < order.shape[0]
    slot = order.at[place].get(mode="fill", fill_value=order.shape[0])
    offset = batch_row - (end - num_new).at[place].get(mode="clip")
    first = state.slots.num_computed.at[slot].get(mode="fill", fill_value=0)
    return Plan(
        slot=slot,
        position=jnp.where(used, first + offset, 0),
        batch_size=end[-1],
        num_new=jnp.zeros_like(num_new).at[order].set(num_new),
        copy_from=copied_page,
        copy_to=jnp.where(copied_page < state.table.num_pages, _page_to_write(state, config), state.table.num_pages),
    )


def samples(state: EngineState, num_new: Int32[Array, " S"]) -> Bool[Array, " S"]:
    """Returns the slots that draw a token in this step: those whose latest token is in the batch."""
    return state.active & (num_new == remaining(state))


def advance(state: EngineState, num_new: Int32[Array, " S"], token: Int32[Array, " S"]) -> EngineState:
    """Records what the step computed: keys and values of `num_new` tokens, and one new token per sampling slot.

    A sequence ends here when the new token stops it, or else when it has reached its greatest length.
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
    """Returns whether the generated tokens end with a stop sequence, and are at least `min_tokens`."""
    sequences = queue.stop_sequences.at[row].get(mode="fill", fill_value=-1)
    if not sequences.shape[1]:
        return jnp.zeros(row.shape, bool)
    start = queue.prompt_length.at[row].get(mode="fill", fill_value=0)[:, None]
    position = num_tokens[:, None] - sequences.shape[2] + jnp.arange(sequences.shape[2], dtype=jnp.int32)[None, :]
    recent = tokens.at[row[:, None], position].get(mode="fill", fill_value=-2)
    recent = jnp.where(position >= start, recent, -2)[:, None, :]
    is_match = jnp.all((sequences < 0) | (sequences == recent), axis=2) & (sequences[:, :, -1] >= 0)
    min_tokens = queue.rules.min_tokens.at[row].get(mode="fill", fill_value=0)
    return jnp.any(is_match, axis=1) & (num_tokens - start[:, 0] >= min_tokens)


def retire(state: EngineState) -> EngineState:
    """Frees the slots and pages of sequences that have finished."""
    status = state.queue.status.at[state.slots.row_id].get(mode="fill", fill_value=Status.FREE)
    return _vacate(state, state.active & (status >= Status.STOP))


def _vacate(state: EngineState, leaving: Bool[Array, " S"]) -> EngineState:
    """Frees the slots in `leaving`, and their pages."""
    queue_size = state.queue.status.shape[0]
    return state.replace(
        slots=state.slots.replace(row_id=jnp.where(leaving, queue_size, state.slots.row_id)),
        table=release_each(state.table, leaving),
    )


def _page_to_write(state: EngineState, config: EngineConfig) -> Int32[Array, " S"]:
    """Returns the page of each slot's first token that is not computed; N = none."""
    index = state.slots.num_computed // config.page_size
    return jnp.take_along_axis(state.table.page_ids, index[:, None], axis=1, mode="clip")[:, 0]


def _ceil_div(a: Int32[Array, ""], b: int) -> Int32[Array, ""]:
    return (a + (b - 1)) // b
