"""The candidates of a beam search: the tokens that may continue each beam, and the choice among them."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.beam_search.state import BeamRules, BeamState, Hypotheses
from jaxserve.core.run_model import in_tiles
from jaxserve.models.bind import BoundModel


def candidates(
    bound: BoundModel, state: BeamState, num_eos: int, *, config: EngineConfig
) -> tuple[Float32[Array, "R C"], Int32[Array, "R C"]]:
    """Returns scores and tokens of the best W + X candidates of each beam, by beam, best first; C = W * (W + X).

    The W best candidates of a request are among them, and so are the W best that do not end a sequence. Only the logits of
    one tile are alive at a time.
    """
    num_requests, width = state.logprob.shape
    num_slots, num_best, tile_size = num_requests * width, width + num_eos, config.tile_sizes[-1]
    active = jnp.repeat(~state.done, width, total_repeat_length=num_slots)
    (order,) = jnp.nonzero(active, size=-(-num_slots // tile_size) * tile_size, fill_value=num_slots)
    so_far = state.logprob.reshape(num_slots)

    def tile(size: int, first: Int32[Array, ""], best: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = lax.dynamic_slice_in_dim(order.astype(jnp.int32), first, size)
        logits = bound.logits(state.hidden.at[slot].get(mode="fill", fill_value=0))
        logprobs = jax.nn.log_softmax(logits, axis=-1) + so_far.at[slot].get(mode="fill", fill_value=0)[:, None]
        scores, ids = lax.top_k(logprobs, num_best)
        return best[0].at[slot].set(scores, mode="drop"), best[1].at[slot].set(ids.astype(jnp.int32), mode="drop")

    empty = (jnp.zeros((num_slots, num_best), jnp.float32), jnp.zeros((num_slots, num_best), jnp.int32))
    num_active = jnp.sum(active, dtype=jnp.int32)
    scores, tokens = in_tiles(tile, empty, jnp.int32(0), num_active, (tile_size,))
    return scores.reshape(num_requests, -1), tokens.reshape(num_requests, -1)


def choose(
    state: BeamState, scores: Float32[Array, "R C"], tokens: Int32[Array, "R C"], rules: BeamRules
) -> tuple[BeamState, Int32[Array, "R W"]]:
    """Continues the W best candidates that do not end a sequence, and adds those of the W best that do to the hypotheses.

    Returns:
      The state, its pages and hidden states unchanged, and the beam that each new one continues.
    """
    width = state.logprob.shape[1]
    length = state.num_generated + 1
    ended = jnp.any(tokens[:, :, None] == rules.eos_token_ids[:, None, :], axis=-1)
    ended = ended | (length >= rules.max_tokens)[:, None]

    def extended(place: Int32[Array, "R W"]) -> tuple[Array, Array]:
        parent = place // (scores.shape[1] // width)
        token = jnp.take_along_axis(tokens, place, axis=1)
        before = jnp.take_along_axis(state.tokens, parent[:, :, None], axis=1)
        return before.at[:, :, state.num_generated].set(token), parent

    logprob, place = lax.top_k(scores, width)
    finished = jnp.take_along_axis(ended, place, axis=1)
    new = Hypotheses(
        tokens=extended(place)[0],
        length=jnp.full_like(place, length),
        logprob=logprob,
        score=jnp.where(finished, logprob / rules.divisor[:, length][:, None], -jnp.inf),
        valid=finished,
    )
    hypotheses = _best(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.hypotheses, new), width)

    running, place = lax.top_k(jnp.where(ended, -jnp.inf, scores), width)
    continued, parent = extended(place)
    attainable = running[:, 0] / rules.attainable_divisor[:, length]
    full = jnp.all(hypotheses.valid, axis=1)
    failed = jnp.any(jnp.isnan(scores), axis=1)
    done = failed | (length >= rules.max_tokens)
    done = done | (full & (rules.stop_when_full | (attainable <= hypotheses.score[:, -1])))
    hypotheses = hypotheses.replace(valid=hypotheses.valid & ~failed[:, None])
    new_state = state.replace(
        tokens=continued,
        logprob=running,
        num_generated=length,
        hypotheses=jax.tree.map(
            lambda old, new: jnp.where(state.done.reshape(-1, *[1] * (new.ndim - 1)), old, new),
            state.hypotheses,
            hypotheses,
        ),
        done=state.done | done,
    )
    return new_state, parent.astype(jnp.int32)


def _best(hypotheses: Hypotheses, width: int) -> Hypotheses:
    """Keeps the `width` best hypotheses of each request, best first."""
    _, place = lax.top_k(hypotheses.score, width)
    return jax.tree.map(lambda leaf: jax.vmap(lambda of_request, places: of_request[places])(leaf, place), hypotheses)
