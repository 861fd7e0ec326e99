"""The choice of tokens from logits, and their log probabilities and ranks. `jaxserve.core.sampling` specifies both."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.native.call import kernel


def choose(
    logits: Float32[Array, "R V"],
    active: Bool[Array, " R"],
    random: Bool[Array, " R"],
    temperature: Float32[Array, " R"],
    top_k: Int32[Array, " R"],
    top_p: Float32[Array, " R"],
    min_p: Float32[Array, " R"],
    uniforms: Float32[Array, "R 2"],
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """Chooses a token for every active logits row: the most likely one, or a drawn one where `random` is True.

    Args:
      logits: one logits row per token to choose.
      active: logits rows that need a token.
      random: whether to draw.
      temperature, top_k, top_p, min_p: parameters of each logits row; `top_k` 0 and `top_p` 1 drop nothing.
      uniforms: two numbers in [0, 1) that decide the draw.

    Returns:
      The tokens, and whether the largest logit is not finite; 0 and False for logits rows that are not active.
    """
    results = (jax.ShapeDtypeStruct(active.shape, jnp.int32), jax.ShapeDtypeStruct(active.shape, jnp.bool_))
    call = kernel("jaxserve_choose", results)
    token, failed = call(logits, active, random, temperature, top_k, top_p, min_p, uniforms)
    return token, failed


def report(
    logits: Float32[Array, "R V"],
    active: Bool[Array, " R"],
    token: Int32[Array, " R"],
    wants_top: Bool[Array, " R"],
    *,
    max_logprobs: int,
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R K"], Float32[Array, "R K"]]:
    """Computes log probabilities of given tokens, their ranks, and the most likely tokens.

    Args:
      logits: one logits row per token.
      active: logits rows to report on.
      token: the token of each logits row.
      wants_top: active logits rows that also want the rank of their token and the most likely tokens.
      max_logprobs: K, how many of the most likely tokens to return.

    Returns:
      Log probability and rank (1 is the most likely) of each token, and ids and log probabilities of the K most likely ones.
      Results that a logits row does not want are 0, and ids are -1.
    """
    num_rows = token.shape[0]
    results = (
        jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, max_logprobs), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, max_logprobs), jnp.float32),
    )
    logprob, rank, ids, values = kernel("jaxserve_report", results)(logits, active, token, wants_top)
    return logprob, rank, ids, values
