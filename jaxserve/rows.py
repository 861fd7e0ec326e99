"""Requests made into rows of the queue: everything a request asks for is checked here, before any device work."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.models import ModelConfig
from jaxserve.request import MAX_INT32, SamplingParams, check_ids, check_int
from jaxserve.sampling import SamplingRows
from jaxserve.scheduler.submission import Submission


def check_prompt(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    model: ModelConfig,
    config: EngineConfig,
    eos_token_ids: Sequence[int] = (),
) -> None:
    """Refuses what this engine cannot do.

    Raises:
      ValueError: naming the value, the rule and the remedy, if the prompt is empty, too long or has ids outside the
        vocabulary, if there are more stop tokens or logprobs than the engine has room for.
    """
    num_tokens, vocab_size = len(prompt_token_ids), model.vocab_size
    if not num_tokens:
        raise ValueError("the prompt has no tokens: give at least one")
    if num_tokens >= config.max_model_len:
        raise ValueError(
            f"the prompt has {num_tokens} tokens, but max_model_len={config.max_model_len} tokens hold prompt and "
            f"output together: shorten the prompt to {config.max_model_len - 1} or raise max_model_len"
        )
    for name, ids in (("prompt_token_ids", prompt_token_ids), ("stop_token_ids", params.stop_token_ids)):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"{name} has {outside[0]}, but the model's token ids go from 0 to {vocab_size - 1}")
    num_stops = len(_stops(params, eos_token_ids))
    if num_stops > config.max_stop_token_ids:
        raise ValueError(
            f"the request has {num_stops} stop tokens, end-of-sequence included, but max_stop_token_ids="
            f"{config.max_stop_token_ids}: use fewer or raise max_stop_token_ids"
        )
    if params.logprobs is not None and params.logprobs > config.max_logprobs:
        raise ValueError(
            f"logprobs={params.logprobs} is above max_logprobs={config.max_logprobs}: ask for fewer or raise max_logprobs"
        )


def one_per_prompt(
    num_prompts: int,
    params: SamplingParams | Sequence[SamplingParams] | None,
    priorities: Sequence[int] | None,
) -> list[tuple[SamplingParams, int]]:
    """Parameters and priority of each prompt, from one for all or one per prompt.

    Raises:
      ValueError: if there are more or fewer of them than prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} SamplingParams for {num_prompts} prompts: give one, or one per prompt")
    if priorities is None:
        priorities = [0] * num_prompts
    if len(priorities) != num_prompts:
        raise ValueError(f"{len(priorities)} priorities for {num_prompts} prompts: give one per prompt")
    return list(zip(params, priorities, strict=True))


def make_submission(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    model: ModelConfig,
    config: EngineConfig,
    eos_token_ids: Sequence[int] = (),
    priorities: Sequence[int] | None = None,
    seed: int = 0,
    num_rows: int | None = None,
) -> Submission:
    """Rows for `jaxserve.submit`, one per prompt, as host arrays.

    Args:
      prompts: token ids.
      params: for all prompts, or one per prompt; None: the defaults. Without a seed of its own, request i gets
        `derived_seed(seed, i)`.
      model: gives the vocabulary.
      config: gives the capacities.
      eos_token_ids: end the sequences of requests that do not set `ignore_eos`.
      priorities: one per prompt; None: all 0.
      seed: of the requests without one.
      num_rows: rows of the submission, padding included, so that submissions of all sizes share one program;
        None: one per prompt.

    Raises:
      ValueError: as `check_prompt`, naming the prompt by its index; or if there are more prompts than `num_rows`.
    """
    each = one_per_prompt(len(prompts), params, priorities)
    prompts = [check_ids(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]
    each = [(wanted, check_int("priority", priority, -MAX_INT32)) for wanted, priority in each]
    check_int("seed", seed, 0, 2**64 - 1)
    width = len(prompts) if num_rows is None else num_rows
    if len(prompts) > width:
        raise ValueError(f"{len(prompts)} prompts do not fit num_rows={width}: submit them in several parts")
    rows = empty_submission(width, config)
    for index, (prompt, (wanted, priority)) in enumerate(zip(prompts, each, strict=True)):
        try:
            check_prompt(prompt, wanted, model=model, config=config, eos_token_ids=eos_token_ids)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        own_seed = derived_seed(seed, index) if wanted.seed is None else wanted.seed
        fill_row(rows, index, prompt, wanted, seed=own_seed, priority=priority, eos_token_ids=eos_token_ids)
    return rows


def derived_seed(seed: int, number: int) -> int:
    """The seed of a request that has none: a hash of the engine's seed and the request's running number."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def key_data(seed: int) -> np.ndarray:
    """The threefry key of a seed in [0, 2^64), uint32[2]."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def empty_submission(num_rows: int, config: EngineConfig) -> Submission:
    """A submission of nothing: host arrays, to be filled by `fill_row`."""
    sampling = SamplingRows(
        temperature=_rows((num_rows,), 0, np.float32),
        top_k=_rows((num_rows,), 0),
        top_p=_rows((num_rows,), 1, np.float32),
        min_p=_rows((num_rows,), 0, np.float32),
        key_data=_rows((num_rows, 2), 0, np.uint32),
        sample_index=_rows((num_rows,), 0),
        num_logprobs=_rows((num_rows,), -1),
    )
    return Submission(
        tokens=_rows((num_rows, config.max_model_len), 0),
        prompt_length=_rows((num_rows,), 0),
        max_tokens=_rows((num_rows,), 0),
        stop_token_ids=_rows((num_rows, config.max_stop_token_ids), -1),
        sampling=sampling,
        priority=_rows((num_rows,), 0),
        valid=_rows((num_rows,), False, bool),
    )


def fill_row(
    rows: Submission,
    index: int,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    priority: int,
    eos_token_ids: Sequence[int],
) -> None:
    """Writes one checked request into row `index` of an `empty_submission`."""
    stops = _stops(params, eos_token_ids)
    rows.tokens[index, : len(prompt_token_ids)] = prompt_token_ids
    rows.prompt_length[index] = len(prompt_token_ids)
    rows.max_tokens[index] = params.max_tokens
    rows.stop_token_ids[index, : len(stops)] = stops
    rows.priority[index] = priority
    rows.valid[index] = True
    sampling = rows.sampling
    sampling.temperature[index] = params.temperature
    sampling.top_k[index] = params.top_k
    sampling.top_p[index] = params.top_p
    sampling.min_p[index] = params.min_p
    sampling.key_data[index] = key_data(seed)
    sampling.num_logprobs[index] = -1 if params.logprobs is None else params.logprobs


def _rows(shape: tuple[int, ...], value: float, dtype: Any = np.int32) -> Any:
    return np.full(shape, value, dtype)


def _stops(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]))
