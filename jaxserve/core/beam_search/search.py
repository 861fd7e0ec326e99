"""The loop of a beam search: it keeps the W best continuations of each prompt, their keys and values on shared pages.

Scores, candidates and stop rules are those of transformers' vectorised `_beam_search` (5.24), applied to one request at a time,
so that a request's result does not depend on its neighbours. A beam is a slot: beam b of request r is slot r * W + b.

    state = start(params, prompts, ...)          the prompt is computed once, in the slot of beam 0
    state = advance(params, state, ...)          choose W of all beams' candidates, move pages, compute the new tokens
    results = beam_search(params, prompts, ...)  `advance` until every request is done, in one loop on the device

A chosen candidate may continue any beam of its request, its parent: `jaxserve.core.beam_search.pages` moves the pages.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.beam_search.candidates import candidates, choose
from jaxserve.core.beam_search.capacities import check_capacities, longest, valid_requests
from jaxserve.core.beam_search.pages import move_pages
from jaxserve.core.beam_search.state import BeamRules, BeamState, Hypotheses
from jaxserve.core.cache import KVPool, PageTable, init_kv_pool, init_page_table
from jaxserve.core.cache.attention import BatchLayout
from jaxserve.core.cache.kv_pool import stores_bits
from jaxserve.core.cache.page_table import allocate
from jaxserve.core.run_model import TokenBatch, in_tiles, run_model
from jaxserve.models import ModelConfig
from jaxserve.models.bind import BoundModel, bind
from jaxserve.models.prepare import Params, loaded_dtype, prepare


def beam_search(
    params: Params,
    prompts: Int32[Array, "R M"],
    prompt_length: Int32[Array, " R"],
    rules: BeamRules,
    *,
    model: ModelConfig,
    config: EngineConfig,
    width: int,
    num_return: int | None = None,
) -> Hypotheses:
    """Returns the best `num_return` continuations of each prompt that a beam of `width` finds, best first.

    Width 1 is greedy search if `rules.stop_when_full`, which `make_beam_rules` sets then. Of equal scores the lower beam
    goes first, then the lower token id. The search makes a KV pool of its own.

    Args:
      params: `nnx.split(Transformer(model))[1]`, or what `prepare` made of it.
      prompts: token ids; entries beyond `prompt_length` may have any value.
      prompt_length: number of tokens, at least 1. A request with a length, token or rule out of range gets no valid hypothesis.
      rules: the rules of each request.
      model: static.
      config: static. Of its capacities, `max_slots` bounds R * W, `num_pages` (if set) bounds the pool, and `max_model_len`
        bounds prompt and output together; page size, tiles and backend are used as they are.
      width: static; W.
      num_return: static, at most `width`; None means `width`.

    Raises:
      ValueError: while tracing, if the beams or the pages that they may need exceed these capacities, or if the vocabulary
        is too small for `width` candidates beside the end of sequence.
    """
    params = prepare(params, model, config.backend, config.weight_dtype)
    state = start(params, prompts, prompt_length, rules, model=model, config=config, width=width)
    num_return = width if num_return is None else num_return
    if not 1 <= num_return <= width:
        raise ValueError(f"num_return={num_return} must lie between 1 and width={width}: raise width or ask for fewer")
    step = functools.partial(advance, params, rules=rules, model=model, config=config)
    state = lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
    return jax.tree.map(lambda leaf: leaf[:, :num_return], state.hypotheses)


def start(
    params: Params,
    prompts: Int32[Array, "R M"],
    prompt_length: Int32[Array, " R"],
    rules: BeamRules,
    *,
    model: ModelConfig,
    config: EngineConfig,
    width: int,
) -> BeamState:
    """Computes each prompt in the slot of its request's beam 0. Arguments and errors are those of `beam_search`."""
    num_requests, capacity = prompts.shape
    params = prepare(params, model, config.backend, config.weight_dtype)
    num_slots, max_new, max_len = num_requests * width, rules.divisor.shape[1] - 1, longest(model, config)
    num_pages = check_capacities(num_requests, capacity, rules, width, model=model, config=config)
    valid = valid_requests(prompts, prompt_length, rules, model=model, config=config)
    prompt_length = jnp.where(valid, prompt_length, 0)

    pages_per_slot = -(-(min(capacity + max_new, max_len) - 1) // config.page_size)
    table = init_page_table(num_slots, max(pages_per_slot, 1), num_pages)

    def allocate_prompt(request: Int32[Array, ""], table: PageTable) -> PageTable:
        return allocate(table, request * width, -(-prompt_length[request] // config.page_size))[0]

    table = lax.fori_loop(jnp.int32(0), jnp.int32(num_requests), allocate_prompt, table)
    kv_dtype = config.kv_dtype or str(loaded_dtype(params))
    ends = jnp.cumsum(prompt_length, dtype=jnp.int32)

    def batch(index: Int32[Array, " B"]) -> TokenBatch:
        request = jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        length = prompt_length.at[request].get(mode="fill", fill_value=0)
        position = index - (ends.at[request].get(mode="fill", fill_value=0) - length)
        slot = jnp.where(request < num_requests, request * width, num_slots)
        token = prompts.at[request, position].get(mode="fill", fill_value=0)
        return TokenBatch(slot=slot, position=position, token=token, is_last=position == length - 1)

    zeros = jnp.zeros((num_requests, width, max_new), jnp.int32)
    excluded = jnp.full((num_requests, width), -jnp.inf, jnp.float32)
    state = BeamState(
        table=table,
        pool=init_kv_pool(model, num_pages, config.page_size, kv_dtype, as_bits=stores_bits(config.backend)),
        hidden=jnp.zeros((num_slots, model.embed_dim), jnp.float32),
        prompt_length=prompt_length,
        tokens=zeros,
        logprob=excluded.at[:, 0].set(0),  # the other beams would repeat the first one
        num_generated=jnp.int32(0),
        hypotheses=Hypotheses(
            tokens=zeros, length=zeros[..., 0], logprob=excluded, score=excluded, valid=jnp.zeros(excluded.shape, bool)
        ),
        done=~valid,
    )
    return _run_batch(bind(params, model), state, batch, ends[-1], BatchLayout.CHUNKS, model=model, config=config)


def advance(
    params: Params, state: BeamState, rules: BeamRules, *, model: ModelConfig, config: EngineConfig
) -> BeamState:
    """Generates one more token for the beams of requests that are not done."""
    num_requests, width = state.logprob.shape
    params = prepare(params, model, config.backend, config.weight_dtype)
    bound = bind(params, model)
    scores, tokens = candidates(bound, state, rules.eos_token_ids.shape[1], config=config)
    new, parent = choose(state, scores, tokens, rules)
    new = move_pages(new, parent, page_size=config.page_size)
    num_slots = num_requests * width
    active = jnp.repeat(~new.done, width, total_repeat_length=num_slots)
    (order,) = jnp.nonzero(active, size=num_slots, fill_value=num_slots)

    def batch(index: Int32[Array, " B"]) -> TokenBatch:
        slot = order.astype(jnp.int32).at[index].get(mode="fill", fill_value=num_slots)
        position = new.prompt_length.at[slot // width].get(mode="fill", fill_value=0) + new.num_generated - 1
        token = new.tokens.reshape(num_slots, -1).at[slot, new.num_generated - 1].get(mode="fill", fill_value=0)
        return TokenBatch(slot=slot, position=position, token=token, is_last=slot < num_slots)

    num_active = jnp.sum(active, dtype=jnp.int32)
    return _run_batch(bound, new, batch, num_active, BatchLayout.SINGLE, model=model, config=config)


def _run_batch(
    bound: BoundModel,
    state: BeamState,
    batch: Callable[[Int32[Array, " B"]], TokenBatch],
    batch_size: Int32[Array, ""],
    layout: BatchLayout,
    *,
    model: ModelConfig,
    config: EngineConfig,
) -> BeamState:
    """Runs the model on batch rows 0 .. batch_size - 1, tile by tile; `batch` makes the tokens of given batch rows."""

    def tile(
        size: int, first: Int32[Array, ""], carry: tuple[KVPool, Float32[Array, "S E"]]
    ) -> tuple[KVPool, Float32[Array, "S E"]]:
        pool, hidden = carry
        tokens = batch(first + jnp.arange(size, dtype=jnp.int32))
        return run_model(bound, tokens, (state.table, pool), hidden, layout, model=model, config=config)[1:]

    tile_size = config.tile_sizes[0 if layout is BatchLayout.CHUNKS else -1]
    pool, hidden = in_tiles(tile, (state.pool, state.hidden), jnp.int32(0), batch_size, (tile_size,))
    return state.replace(pool=pool, hidden=hidden)
