"""Searches of a vocabulary that sort nothing: the largest logits, thresholds, and a draw in proportion to weights.

Every function works on each of R vocabularies on its own.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxserve.core.optional import if_any

_BLOCK = 128  # tokens per block of the two-level draw


def top(k: int, piece: int) -> Callable[[Float32[Array, "R V"]], tuple[Float32[Array, "R K"], Int32[Array, "R K"]]]:
    """Returns a function that finds the k largest logits and their ids, like `lax.top_k`, at most `piece` per search.

    Each search removes its results before the next one starts.
    """

    def search(logits: Float32[Array, "R V"]) -> tuple[Float32[Array, "R K"], Int32[Array, "R K"]]:
        left = jnp.maximum(logits, jnp.finfo(jnp.float32).min)  # -inf marks logits that were removed
        left = jnp.where(left == 0, 0, left)  # `lax.top_k` puts 0.0 before -0.0, whichever has the lower id
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        pieces: list[Array] = []
        for first in range(0, k, piece):
            ids = lax.top_k(left, min(piece, k - first))[1].astype(jnp.int32)
            left = left.at[rows, ids].set(-jnp.inf)
            pieces.append(ids)
        ids = jnp.concatenate(pieces, axis=1) if pieces else jnp.zeros((logits.shape[0], 0), jnp.int32)
        return jnp.take_along_axis(logits, ids, axis=1), ids

    return search


def drop_ties(
    weights: Float32[Array, "R V"], tied: Bool[Array, "R V"], excess: Float32[Array, " R"]
) -> Float32[Array, "R V"]:
    """Drops the first of equal tokens at the top-p threshold while they fit into the excess mass, as a stable sort would.

    Args:
      weights: the weights that tokens are drawn in proportion to.
      tied: the tokens whose weight is that of the threshold.
      excess: mass that top-p may still drop.
    """
    weight = jnp.max(jnp.where(tied, weights, 0), axis=-1)
    num_tied = jnp.sum(tied, axis=-1, dtype=jnp.int32)
    fitting = jnp.floor(excess / jnp.where(weight > 0, weight, 1)).astype(jnp.int32)
    num_dropped = jnp.clip(fitting, 0, jnp.maximum(num_tied - 1, 0))

    def drop(weights: Float32[Array, "R V"], tied: Bool[Array, "R V"]) -> Float32[Array, "R V"]:
        order = jnp.cumsum(tied.astype(jnp.int32), axis=-1, dtype=jnp.int32)
        return jnp.where(tied & (order <= num_dropped[:, None]), 0, weights)

    return if_any(num_dropped > 0, drop, weights, tied)


def ordered_bits(x: Float32[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Returns unsigned integers that compare as the floats do; x must hold no NaN and no -0.0."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = (bits >> jnp.uint32(31)).astype(bool)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def largest(holds: Callable[[UInt32[Array, "R 1"]], Bool[Array, " R"]], shape: tuple[int, ...]) -> UInt32[Array, " R"]:
    """Returns the largest uint32 values for which `holds`: a condition that is true at 0 and, once false, stays false."""

    def decide_bit(index: Int32[Array, ""], value: UInt32[Array, " R"]) -> UInt32[Array, " R"]:
        candidate = value | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(candidate[:, None]), candidate, value)

    return lax.fori_loop(0, 32, decide_bit, jnp.zeros(shape, jnp.uint32))


def pick(weights: Float32[Array, "R V"], uniforms: Float32[Array, "R 2"]) -> Int32[Array, " R"]:
    """Draws tokens in proportion to weights by inverse transform sampling in two levels: a block, then a token within it.

    A token of weight 0 is never picked, whatever the rounding.
    """
    _, vocab_size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab_size % _BLOCK))).reshape(weights.shape[0], -1, _BLOCK)
    block = inverse(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + inverse(inside, uniforms[:, 1])


def inverse(weights: Float32[Array, "R X"], uniform: Float32[Array, " R"]) -> Int32[Array, " R"]:
    """Returns the first index at which the running sum of the weights exceeds `uniform` of their total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    possible = weights > 0
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)[None, :]
    first = jnp.min(jnp.where(possible & (cumulative > target), index, weights.shape[1]), axis=-1)
    last = jnp.max(jnp.where(possible, index, 0), axis=-1)
    return jnp.minimum(first, last)
