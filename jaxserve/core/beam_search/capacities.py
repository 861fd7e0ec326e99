"""The capacities that a beam search needs, and the checks that it fits."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.beam_search.state import BeamRules
from jaxserve.models import ModelConfig


def pages_per_request(prompt_capacity: int, max_new: int, *, width: int, max_len: int, page_size: int) -> int:
    """Returns the most pages that a request can hold at one time: full prompt pages once, all later ones once per beam.

    The last token of a beam is never computed, so it needs no place in a page.

    Args:
      prompt_capacity: tokens of the longest prompt.
      max_new: most tokens to generate.
      width: W.
      max_len: most tokens of prompt and output together.
      page_size: T.
    """
    prompt = np.arange(1, prompt_capacity + 1)
    computed = prompt + np.minimum(max_new, max_len - prompt) - 1
    shared = prompt // page_size
    return int(np.max(shared + width * (-(-computed // page_size) - shared)))


def longest(model: ModelConfig, config: EngineConfig) -> int:
    """Returns the most tokens that prompt and output may have together."""
    return min(model.max_position, config.max_sequence_len)


def check_capacities(
    num_requests: int, prompt_capacity: int, rules: BeamRules, width: int, *, model: ModelConfig, config: EngineConfig
) -> int:
    """Returns the number of pages that the pool needs.

    Raises:
      ValueError: if the requests do not fit into the capacities of the configuration or the limits of the model.
    """
    max_len, max_new, num_eos = longest(model, config), rules.divisor.shape[1] - 1, rules.eos_token_ids.shape[1]
    if width < 1:
        raise ValueError(f"width={width} must be at least 1: a beam search keeps that many beams")
    if min(num_requests, prompt_capacity, max_new) < 1:
        raise ValueError(
            f"{num_requests} prompts of {prompt_capacity} tokens with room for {max_new} new ones: give at least one of each"
        )
    if model.vocab_size < width + num_eos:
        raise ValueError(
            f"width={width} needs as many candidates beside {num_eos} end-of-sequence ids, but the vocabulary has "
            f"{model.vocab_size} tokens: use a smaller width"
        )
    if num_requests * width > config.max_slots:
        raise ValueError(
            f"{num_requests} requests of width={width} are {num_requests * width} beams, above max_slots="
            f"{config.max_slots}: use fewer requests, a smaller width or more slots"
        )
    if prompt_capacity >= max_len:
        raise ValueError(
            f"prompts of {prompt_capacity} tokens leave nothing of the {max_len} that max_model_len and the model allow "
            f"for prompt and output: use at most {max_len - 1}"
        )
    each = pages_per_request(prompt_capacity, max_new, width=width, max_len=max_len, page_size=config.page_size)
    num_pages = num_requests * each
    if config.num_pages is not None and num_pages > config.num_pages:
        raise ValueError(
            f"{num_requests} requests of width={width}, prompts of up to {prompt_capacity} tokens and max_tokens={max_new} "
            f"may need {num_pages} pages of {config.page_size} tokens, above num_pages={config.num_pages}: use fewer "
            "requests, a smaller width, fewer tokens or more pages"
        )
    return num_pages


def valid_requests(
    prompts: Int32[Array, "R M"],
    prompt_length: Int32[Array, " R"],
    rules: BeamRules,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> Bool[Array, " R"]:
    """Returns which requests can be searched: their ids, lengths and rules are in range."""
    capacity, max_new = prompts.shape[1], rules.divisor.shape[1] - 1
    beyond = jnp.arange(capacity, dtype=jnp.int32)[None, :] >= prompt_length[:, None]
    in_vocab = jnp.all(beyond | ((prompts >= 0) & (prompts < model.vocab_size)), axis=1)
    fits = (prompt_length >= 1) & (prompt_length <= capacity) & (rules.max_tokens >= 1) & (rules.max_tokens <= max_new)
    return in_vocab & fits & (prompt_length + rules.max_tokens <= longest(model, config))
