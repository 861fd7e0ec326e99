"""Makes requests into rows of the queue. Everything that a request asks for is checked here, before any device work."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.core.columns import axis_sizes, fill_parameters, off_rows
from jaxserve.core.logit_rules import BITS
from jaxserve.core.scheduler.submission import Submission
from jaxserve.models import ModelConfig
from jaxserve.request import MAX_INT32, SamplingParams, check_ids, check_int


def check_prompt(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    model: ModelConfig,
    config: EngineConfig,
    eos_token_ids: Sequence[int] = (),
) -> None:
    """Refuses a request that this engine cannot serve.

    Raises:
      ValueError: naming the value, the rule and the remedy, if the prompt is empty or too long, a token id is not in the
        vocabulary, or a parameter is above a capacity of `config`.
    """
    num_tokens, vocab_size = len(prompt_token_ids), model.vocab_size
    if not num_tokens:
        raise ValueError("the prompt has no tokens: give at least one")
    if num_tokens >= config.max_sequence_len:
        raise ValueError(
            f"the prompt has {num_tokens} tokens, but max_model_len={config.max_sequence_len} tokens hold prompt and "
            f"output together: shorten the prompt to {config.max_sequence_len - 1} or raise max_model_len"
        )
    for name, ids in _token_ids(prompt_token_ids, params):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"{name} has {outside[0]}, but the model's token ids go from 0 to {vocab_size - 1}")
    num_stops = len(_stops(params, eos_token_ids))
    if num_stops > config.max_stop_token_ids:
        raise ValueError(
            f"the request has {num_stops} stop tokens, end-of-sequence included, but max_stop_token_ids="
            f"{config.max_stop_token_ids}: use fewer or raise max_stop_token_ids"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > config.max_logprobs:
            raise ValueError(
                f"{name}={getattr(params, name)} is above max_logprobs={config.max_logprobs}: ask for fewer or raise "
                "max_logprobs"
            )
    _check_room("logit_bias", "token ids", len(_bias(params)), "max_logit_bias", config)
    for name, sequences, capacity, longest in (
        ("bad_words", _bad_words(params), "max_bad_words", "max_bad_word_len"),
        ("stop", params.stop_sequences, "max_stop_sequences", "max_stop_sequence_len"),
    ):
        _check_room(name, "token sequences", len(sequences), capacity, config)
        _check_room(name, "tokens in one sequence", max(map(len, sequences), default=0), longest, config)
    if not config.penalties and _has_penalties(params):
        raise ValueError(
            "presence_penalty, frequency_penalty and repetition_penalty need penalties=true in the engine's configuration"
        )


def _check_room(name: str, what: str, number: int, capacity: str, config: EngineConfig) -> None:
    if number > getattr(config, capacity):
        raise ValueError(
            f"{name} has {number} {what}, but {capacity}={getattr(config, capacity)}: use fewer or raise {capacity}"
        )


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _bias(params: SamplingParams) -> tuple[tuple[int, float], ...]:
    bias: Any = params.logit_bias  # pairs, once the parameters are made
    return bias


def _bad_words(params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    for word in params.bad_words:
        if isinstance(word, str):
            raise ValueError(f"bad_words has the text {word!r}, which needs a tokenizer: give lists of token ids here")
    return tuple(word for word in params.bad_words if not isinstance(word, str))


def _token_ids(prompt_token_ids: Sequence[int], params: SamplingParams) -> Iterator[tuple[str, Sequence[int]]]:
    """Yields every list of token ids in a request with the name of its field."""
    yield "prompt_token_ids", prompt_token_ids
    yield "stop_token_ids", params.stop_token_ids
    yield "allowed_token_ids", params.allowed_token_ids or ()
    yield "logit_bias", [token for token, _ in _bias(params)]
    for word in _bad_words(params):
        yield "bad_words", word
    for sequence in params.stop_sequences:
        yield "stop", sequence


def one_per_prompt(
    num_prompts: int,
    params: SamplingParams | Sequence[SamplingParams] | None,
    priorities: Sequence[int] | None,
) -> list[tuple[SamplingParams, int]]:
    """Returns parameters and priority for each prompt, from one for all or one per prompt.

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
    aux: Any = None,
) -> Submission:
    """Returns rows for `jaxserve.submit` as host arrays: for each prompt in turn, a row for each of its `n` samples.

    Args:
      prompts: token ids.
      params: parameters for all prompts, or one per prompt; None: the defaults. Without a seed of its own, request i gets
        `derived_seed(seed, i)`.
      model: gives the size of the vocabulary.
      config: gives the capacities.
      eos_token_ids: the ids that end the sequences of requests without `ignore_eos`.
      priorities: one per prompt; None: all 0.
      seed: the number in [0, 2^64) that the seeds of requests without one are derived from.
      num_rows: rows of the submission, padding included, so that submissions of all sizes share one program;
        None: one per sample.
      aux: initial value of what a `LogitsFn` remembers, as for `init_state`.

    Raises:
      ValueError: as `check_prompt` does, naming the prompt by its index; or if there are more samples than `num_rows`.
    """
    each = one_per_prompt(len(prompts), params, priorities)
    prompts = [check_ids(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]
    each = [(own, check_int("priority", priority, -MAX_INT32)) for own, priority in each]
    check_int("seed", seed, 0, 2**64 - 1)
    num_samples = sum(own.n for own, _ in each)
    width = num_samples if num_rows is None else num_rows
    if num_samples > width:
        raise ValueError(f"{num_samples} samples do not fit num_rows={width}: submit them in several parts")
    row = 0
    rows = empty_submission(width, model, config, aux)
    for index, (prompt, (own, priority)) in enumerate(zip(prompts, each, strict=True)):
        try:
            if own.stop_strings:
                raise ValueError(
                    f"stop has the text {own.stop_strings[0]!r}, which needs a host: give lists of token ids"
                )
            prompt = truncated(prompt, own, config)
            check_prompt(prompt, own, model=model, config=config, eos_token_ids=eos_token_ids)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        own_seed = derived_seed(seed, index) if own.seed is None else own.seed
        for sample_index in range(own.n):
            fill_row(
                rows,
                row,
                prompt,
                own,
                seed=own_seed,
                priority=priority,
                eos_token_ids=eos_token_ids,
                sample_index=sample_index,
            )
            row += 1
    return rows


def truncated(prompt_token_ids: Sequence[int], params: SamplingParams, config: EngineConfig) -> tuple[int, ...]:
    """Returns the last tokens of a prompt, as many as `truncate_prompt_tokens` says."""
    limit = params.truncate_prompt_tokens
    limit = config.max_sequence_len - 1 if limit == -1 else limit
    return tuple(prompt_token_ids if limit is None else prompt_token_ids[-limit:])


def derived_seed(seed: int, number: int) -> int:
    """Returns the seed of a request that has none: a hash of the engine's seed and the request's running number."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def key_data(seed: int) -> np.ndarray:
    """Returns the threefry key of a seed in [0, 2^64), uint32[2]."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def empty_submission(num_rows: int, model: ModelConfig, config: EngineConfig, aux: Any = None) -> Submission:
    """Returns a submission without sequences: host arrays for `fill_row` to write into; `aux` is as for `init_state`."""
    initial_aux = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], num_rows, axis=0), aux)
    return off_rows(Submission, num_rows, axis_sizes(model.vocab_size, config), np.full, aux=initial_aux)


def fill_row(
    rows: Submission,
    index: int,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    priority: int,
    eos_token_ids: Sequence[int],
    sample_index: int = 0,
    aux: Any = None,
) -> None:
    """Writes one sample of a checked request into row `index` of an `empty_submission`; `aux` None leaves what is there."""
    stops = _stops(params, eos_token_ids)
    rows.tokens[index, : len(prompt_token_ids)] = prompt_token_ids
    rows.prompt_length[index] = len(prompt_token_ids)
    rows.max_tokens[index] = params.max_tokens
    rows.stop_token_ids[index, : len(stops)] = stops
    rows.priority[index] = priority
    rows.valid[index] = True
    sampling = rows.sampling
    fill_parameters(sampling, index, params)
    sampling.key_data[index] = key_data(seed)
    sampling.sample_index[index] = sample_index
    rows.follows[index] = sample_index > 0
    sampling.num_logprobs[index] = -1 if params.logprobs is None else params.logprobs
    sampling.processed[index] = params.logprobs_mode == "processed"
    if params.prompt_logprobs is not None and sample_index == 0:  # the prompt is the same for all
        rows.num_prompt_logprobs[index] = params.prompt_logprobs
    _fill_aligned(rows.stop_sequences[index], params.stop_sequences)
    _fill_rules(rows.rules, index, params)
    if aux is not None:
        jax.tree.map(functools.partial(_set_leaf, index), rows.aux, aux)


def check_aux(aux: Any, initial: Any) -> None:
    """Refuses a request's `aux` that differs from the engine's in structure, shapes or dtypes.

    Raises:
      ValueError: naming both.
    """
    kinds = [
        jax.tree.map(lambda leaf: f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}", tree) for tree in (aux, initial)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"aux is {kinds[0]}, but the engine's is {kinds[1]}: make them alike")


def _set_leaf(index: int, leaf: Any, value: Any) -> None:
    leaf[index] = value


def _fill_rules(rules: Any, index: int, params: SamplingParams) -> None:
    fill_parameters(rules, index, params)
    for place, (token, bias) in enumerate(_bias(params)):
        rules.bias_ids[index, place], rules.bias[index, place] = token, bias
    if params.allowed_token_ids is not None:
        rules.restricted[index] = True
        ids = np.array(params.allowed_token_ids)
        np.bitwise_or.at(rules.allowed[index], ids // BITS, np.uint32(1) << (ids % BITS).astype(np.uint32))
    _fill_aligned(rules.bad_words[index], _bad_words(params))


def _fill_aligned(target: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Writes token sequences into the rows of an array, aligned at their end."""
    for place, sequence in enumerate(sequences):
        target[place, -len(sequence) :] = sequence


def _stops(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    """Returns the token ids that end the sequence, once each."""
    return list(dict.fromkeys([*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]))
