"""The end of a step's computation: from hidden states to logits, and from logits to one token per slot that samples."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core import logit_rules
from jaxserve.core.logit_rules import Context
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.run_model import in_tiles
from jaxserve.core.sampling import Sampled, sample
from jaxserve.core.scheduler.state import EngineState
from jaxserve.models.bind import BoundModel


def draw_tokens(
    bound: BoundModel,
    state: EngineState,
    hidden: Float32[Array, "S E"],
    sampled: Bool[Array, " S"],
    logits_fn: LogitsFn | None,
    *,
    config: EngineConfig,
) -> tuple[Any, Sampled]:
    """Draws a token for every slot that samples, tile by tile: only the logits of one tile are alive at a time.

    Args:
      bound: from `jaxserve.models.bind`.
      state: with the token counts of the slots that sample brought up to date.
      hidden: the final hidden state of each slot's latest token.
      sampled: the slots that sample.
      logits_fn: as in `step`.
      config: static.

    Returns:
      The new `aux` of the state, and the drawn tokens; other slots have the entries of `nothing_drawn`.
    """
    num_slots, tile_size, queue = hidden.shape[0], config.tile_size, state.queue
    (order,) = jnp.nonzero(sampled, size=-(-num_slots // tile_size) * tile_size, fill_value=num_slots)
    num_sampling = jnp.sum(sampled, dtype=jnp.int32)
    options: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": config.backend == "native"}

    def tile(size: int, start: Int32[Array, ""], carry: tuple[Any, Sampled]) -> tuple[Any, Sampled]:
        aux, drawn = carry
        slot = lax.dynamic_slice_in_dim(order.astype(jnp.int32), start, size)
        row = state.slots.row_id.at[slot].get(mode="fill", fill_value=queue.status.shape[0])
        sampling, rules = jax.tree.map(lambda leaf: leaf.at[row].get(mode="clip"), (queue.sampling, queue.rules))
        context = Context(
            tokens=queue.tokens.at[row].get(mode="clip"),
            num_tokens=queue.num_tokens.at[row].get(mode="fill", fill_value=0),
            prompt_length=queue.prompt_length.at[row].get(mode="fill", fill_value=0),
            stop_token_ids=queue.stop_token_ids.at[row].get(mode="fill", fill_value=-1),
            slot=slot,
            seen=state.seen,
        )
        num_left = jnp.minimum(num_sampling - start, size)
        logits = bound.logits(hidden.at[slot].get(mode="fill", fill_value=0), num_left)
        active, changed = slot < num_slots, None
        if logits_fn is not None:
            memory = jax.tree.map(lambda leaf: leaf.at[row].get(mode="clip"), aux)
            memory, changed = logits_fn(memory, logit_rules.apply(logits, rules, context, active), context)
            aux = jax.tree.map(lambda old, leaf: old.at[row].set(leaf, mode="drop"), aux, memory)
        new = sample(logits, sampling, rules, context, active, changed=changed, **options)
        return aux, jax.tree.map(lambda old, leaf: old.at[slot].set(leaf, mode="drop"), drawn, new)

    return in_tiles(tile, (state.aux, nothing_drawn(config)), jnp.int32(0), num_sampling, (tile_size,))


def nothing_drawn(config: EngineConfig) -> Sampled:
    """Returns an empty entry for every slot."""
    slots, tops = config.max_slots, config.max_logprobs
    return Sampled(
        token=jnp.zeros((slots,), jnp.int32),
        logprob=jnp.zeros((slots,), jnp.float32),
        rank=jnp.zeros((slots,), jnp.int32),
        top_ids=jnp.full((slots, tops), -1, jnp.int32),
        top_logprobs=jnp.zeros((slots, tops), jnp.float32),
        failed=jnp.zeros((slots,), bool),
    )
