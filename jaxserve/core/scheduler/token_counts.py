"""Counts of the tokens that each slot's sequence has seen, which penalties need.

A slot's counts start again when a sequence is admitted to it: `num_counted` is 0 then, and the slot's entry of `seen` is stale.
A sequence without penalties costs nothing, and one that resumes is counted again from its tokens.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.core.logit_rules import penalised
from jaxserve.core.optional import if_any
from jaxserve.core.scheduler.state import EngineState

_TOKENS_PER_TRIP = 32  # a decoding slot takes one trip of the loop, a prompt one per 32 tokens


def count_tokens(state: EngineState, sampled: Bool[Array, " S"]) -> EngineState:
    """Brings the counts of those slots in `sampled` up to date whose requests have penalties."""
    if state.seen is None:
        return state
    queue, slots = state.queue, state.slots
    num_slots = slots.row_id.shape[0]
    has_penalties = sampled & penalised(queue.rules).at[slots.row_id].get(mode="fill", fill_value=False)
    num_tokens = jnp.where(has_penalties, queue.num_tokens.at[slots.row_id].get(mode="fill", fill_value=0), 0)
    prompt_length = queue.prompt_length.at[slots.row_id].get(mode="fill", fill_value=0)[:, None]

    def is_behind(carry: tuple[Int32[Array, "S V"], Int32[Array, " S"]]) -> Bool[Array, ""]:
        return jnp.any(carry[1] < num_tokens)

    def count(carry: tuple[Int32[Array, "S V"], Int32[Array, " S"]]) -> tuple[Array, Array]:
        seen, num_counted = carry
        position = num_counted[:, None] + jnp.arange(_TOKENS_PER_TRIP, dtype=jnp.int32)[None, :]
        token = queue.tokens.at[slots.row_id[:, None], position].get(mode="clip")
        token = jnp.where(position < num_tokens[:, None], token, seen.shape[1])
        slot = jnp.arange(num_slots, dtype=jnp.int32)[:, None]
        none = seen.shape[1]
        # A token of the prompt sets the lowest bit, however often it occurs; each generated one adds 2, and comes later.
        seen = seen.at[slot, jnp.where(position < prompt_length, token, none)].max(1, mode="drop")
        seen = seen.at[slot, jnp.where(position < prompt_length, none, token)].add(2, mode="drop")
        return seen, jnp.maximum(num_counted, jnp.minimum(num_counted + _TOKENS_PER_TRIP, num_tokens))

    is_new = has_penalties & (slots.num_counted == 0)
    seen = if_any(is_new, lambda seen: jnp.where(is_new[:, None], 0, seen), state.seen)
    seen, num_counted = lax.while_loop(is_behind, count, (seen, slots.num_counted))
    return state.replace(seen=seen, slots=slots.replace(num_counted=num_counted))
