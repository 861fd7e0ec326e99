"""Which sequence is served next and which one is preempted: lower priorities first, then first come first served.

All decisions about order are made here; the transitions carry them out.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.core.scheduler.state import EngineState, Status

_LAST = jnp.iinfo(jnp.int32).max
_FIRST = jnp.iinfo(jnp.int32).min


def next_waiting(state: EngineState) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
    """Returns the waiting row with the lowest (priority, arrival), and whether any row waits."""
    queue = state.queue
    waiting = queue.status == Status.WAITING
    lowest = jnp.min(jnp.where(waiting, queue.priority, _LAST))
    first = waiting & (queue.priority == lowest)
    return jnp.argmin(jnp.where(first, queue.arrival, _LAST)).astype(jnp.int32), jnp.any(waiting)


def may_admit(state: EngineState, num_needed: Int32[Array, ""], num_decoding: Int32[Array, ""]) -> Bool[Array, ""]:
    """Returns whether a sequence that needs `num_needed` pages may start now.

    One page per decoding slot stays free, so that an admission does not cause a preemption in the next steps. When nothing
    runs, no page has to stay free, so the head of the queue always makes progress.
    """
    return (num_needed + num_decoding <= state.table.num_free) | ~jnp.any(state.active)


def victim(state: EngineState) -> Int32[Array, ""]:
    """Returns the slot to preempt: among those in use, the one with the highest (priority, arrival)."""
    row = jnp.where(state.active, state.slots.row_id, 0)
    priority = jnp.where(state.active, state.queue.priority[row], _FIRST)
    last = state.active & (priority == jnp.max(priority))
    return jnp.argmax(jnp.where(last, state.queue.arrival[row], -1)).astype(jnp.int32)


def service_order(state: EngineState, decoding: Bool[Array, " S"]) -> Int32[Array, " S"]:
    """Returns all slots in the order in which a step serves them.

    Decoding slots come first, then prefilling ones, each by (priority, arrival), and unused ones last.
    """
    row = jnp.where(state.active, state.slots.row_id, 0)
    group = jnp.where(decoding, 0, jnp.where(state.active, 1, 2)).astype(jnp.int32)
    slots = jnp.arange(row.shape[0], dtype=jnp.int32)
    keys = (group, state.queue.priority[row], state.queue.arrival[row], slots)
    return lax.sort(keys, num_keys=3)[3]
