"""Beam search for users: texts or tokens in, texts and scores out, around the pure `jaxserve.core.beam_search.beam_search`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.core.beam_search import BeamRules, Hypotheses, beam_search, longest, pages_per_request
from jaxserve.core.cache import bytes_per_page
from jaxserve.core.make_submission import check_prompt
from jaxserve.core.programs import compiler_options
from jaxserve.engine.capacity import platform_of
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, embedding_of, loaded_dtype
from jaxserve.request import SamplingParams, check_ids, check_int
from jaxserve.text.tokenizer import IncrementalDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class BeamParams:
    """How to search. Fields mean what they mean in transformers' `generate`; checked at construction.

    Attributes:
      width: beams per prompt (`num_beams`); 1 is greedy search.
      max_tokens: to generate at most (`max_new_tokens`); clipped to what the longest sequence leaves.
      length_penalty: a hypothesis scores its log probability divided by its length to this power, end of sequence counted:
        above 0 favours long ones.
      early_stopping: True: `width` finished hypotheses end the search. False: so does the worst of them being no worse
        than the best running beam as it is. "never": as False, but as the beam may become: of length `max_tokens` if
        length_penalty > 0.
      num_return: best hypotheses returned per prompt (`num_return_sequences`), at most `width`.
      eos_token_ids: what ends a hypothesis; None: the model's own; (): nothing.
      skip_special_tokens: whether texts are without them.

    Raises:
      ValueError: if a value has the wrong type or is out of range.
    """

    width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return: int = 1
    eos_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_int("width", self.width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        check_int("num_return", self.num_return, 1, self.width)
        if self.eos_token_ids is not None:
            object.__setattr__(self, "eos_token_ids", check_ids("eos_token_ids", self.eos_token_ids))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping={self.early_stopping!r} must be true, false or 'never'")
        if not isinstance(self.skip_special_tokens, bool):
            raise ValueError(f"skip_special_tokens={self.skip_special_tokens!r} must be true or false")
        _divisors(self.length_penalty, self.max_tokens)


@dataclasses.dataclass(frozen=True)
class BeamSequence:
    """One hypothesis."""

    index: int  # 0: the best
    text: str  # without the token that ended it; empty if there is no tokenizer
    token_ids: tuple[int, ...]  # generated, the token that ended it included
    finish_reason: Literal["stop", "length"]
    cumulative_logprob: float  # sum over the tokens
    score: float  # cumulative_logprob / number of tokens ** length_penalty


@dataclasses.dataclass(frozen=True)
class BeamSearchOutput:
    """The result of one prompt."""

    prompt: str | None  # None: it came as tokens
    prompt_token_ids: tuple[int, ...]
    sequences: tuple[BeamSequence, ...]  # best first; empty if there is an error
    error: str | None = None


_ERROR = "the model's logits were not finite: its weights are damaged, or dtype is too narrow for them (try bfloat16)"


def search_beams(
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    beams: BeamParams | None = None,
    *,
    params: Params,
    model: ModelConfig,
    config: EngineConfig,
    tokenizer: Tokenizer | None = None,
    eos_token_ids: Sequence[int] = (),
) -> list[BeamSearchOutput]:
    """The best continuations of prompts, in the order of the prompts.

    As many prompts are searched at once as `config.max_slots` beams and, if it is set, `config.num_pages` allow. The KV pool is
    made for the call, beside that of an engine, and no larger than the beams can need. Programs are compiled for the
    longest prompt, `max_tokens` and the number of prompts, each rounded up to a power of two, and for the width; other
    parameters compile nothing.

    Args:
      prompts: texts, or lists of token ids; a single text is one prompt.
      beams: for all prompts; None: the defaults.
      params: weights, as from `nnx.split(Transformer(model))`.
      model: hyperparameters.
      config: capacities, page size and backend.
      tokenizer: for text prompts and text results.
      eos_token_ids: the model's own end-of-sequence ids.

    Raises:
      ValueError: before anything is generated, if a prompt is not valid (the message has its index), or the beams or pages
        of one prompt do not fit.
    """
    beams = beams or BeamParams()
    eos = tuple(dict.fromkeys(eos_token_ids if beams.eos_token_ids is None else beams.eos_token_ids))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    encoded = []
    for index, prompt in enumerate(texts):
        try:
            encoded.append(_encode(prompt, eos, tokenizer=tokenizer, model=model, config=config))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    if not encoded:
        return []

    num_requests, capacity, max_new = _shape(encoded, beams, model=model, config=config)
    _check_memory(num_requests, capacity, max_new, beams.width, params=params, model=model, config=config)
    search = _program(model, config, beams.width, platform_of(embedding_of(params)))
    outputs: list[BeamSearchOutput] = []
    for first in range(0, len(encoded), num_requests):
        some = encoded[first : first + num_requests]
        rows = np.zeros((num_requests, capacity), np.int32)
        lengths = np.zeros(num_requests, np.int32)  # 0: no request
        for row, prompt in enumerate(some):
            rows[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        rules = make_beam_rules(beams, lengths, eos, max_new=max_new, model=model, config=config)
        found = jax.device_get(search(params, rows, lengths, rules))
        for row, prompt in enumerate(some):
            text = texts[first + row]
            hypotheses = jax.tree.map(lambda leaf, row=row: leaf[row, : beams.num_return], found)
            sequences = _sequences(hypotheses, prompt, eos, tokenizer, beams.skip_special_tokens)
            error = None if sequences else _ERROR
            outputs.append(BeamSearchOutput(text if isinstance(text, str) else None, prompt, sequences, error))
    return outputs


def make_beam_rules(
    beams: BeamParams,
    prompt_lengths: np.ndarray,
    eos_token_ids: Sequence[int] = (),
    *,
    max_new: int | None = None,
    model: ModelConfig,
    config: EngineConfig,
) -> BeamRules:
    """Rules for `beam_search`, one row per prompt, as host arrays.

    Args:
      beams: for all prompts.
      prompt_lengths: of each; decides how many tokens the longest sequence leaves. 0: there is no prompt.
      eos_token_ids: used if `beams` names none.
      max_new: columns for tokens, at least as many as any prompt may get; None: `beams.max_tokens`.
      model: bounds the longest sequence.
      config: likewise, and `max_stop_token_ids` is the number of columns for end-of-sequence ids.

    Raises:
      ValueError: if end-of-sequence ids of `beams` are outside the vocabulary or more than columns, or `max_new` is too small.
    """
    max_new = beams.max_tokens if max_new is None else max_new
    eos = tuple(dict.fromkeys(eos_token_ids if beams.eos_token_ids is None else beams.eos_token_ids))
    outside = [token for token in beams.eos_token_ids or () if token >= model.vocab_size]
    if outside:
        raise ValueError(
            f"eos_token_ids has {outside[0]}, but the model's token ids go from 0 to {model.vocab_size - 1}"
        )
    num_unused = config.max_stop_token_ids - len(eos)
    if num_unused < 0:
        raise ValueError(
            f"{len(eos)} end-of-sequence ids are above max_stop_token_ids={config.max_stop_token_ids}: use fewer or "
            "raise max_stop_token_ids"
        )
    room = np.where(prompt_lengths > 0, longest(model, config) - prompt_lengths, 0)
    max_tokens = np.clip(room, 0, beams.max_tokens).astype(np.int32)
    if np.max(max_tokens, initial=0) > max_new:
        raise ValueError(
            f"max_new={max_new} is less than the {np.max(max_tokens)} tokens that a prompt may get: raise it"
        )
    divisor = np.ones((len(max_tokens), max_new + 1), np.float32)
    known = _divisors(beams.length_penalty, min(beams.max_tokens, max_new))
    divisor[:, : len(known)] = known
    attainable = divisor
    if beams.early_stopping == "never" and beams.length_penalty > 0:
        attainable = np.repeat(np.take_along_axis(divisor, max_tokens[:, None], axis=1), max_new + 1, axis=1)
    rows: dict[str, Any] = {
        "max_tokens": max_tokens,
        "eos_token_ids": np.tile(np.array(eos + (-1,) * num_unused, np.int32), (len(max_tokens), 1)),
        "stop_when_full": np.full(len(max_tokens), beams.early_stopping is True or beams.width == 1),
        "divisor": divisor,
        "attainable_divisor": attainable,
    }
    return BeamRules(**rows)


def _divisors(length_penalty: Any, max_new: int) -> np.ndarray:
    """length ** length_penalty for lengths 0 .. max_new, rounded to float32 once, as transformers does; [0] has no meaning."""
    rule = "must be a finite number"
    if (
        isinstance(length_penalty, bool)
        or not isinstance(length_penalty, int | float)
        or not math.isfinite(length_penalty)
    ):
        raise ValueError(f"length_penalty={length_penalty!r} {rule}")
    with np.errstate(all="ignore"):
        divisors = np.power(np.arange(max_new + 1, dtype=np.float64), float(length_penalty)).astype(np.float32)
    divisors[0] = 1
    if not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise ValueError(
            f"length_penalty={length_penalty!r} is out of float32's range for {max_new} tokens: use one nearer to 0"
        )
    return divisors


def _encode(
    prompt: Any, eos: tuple[int, ...], *, tokenizer: Tokenizer | None, model: ModelConfig, config: EngineConfig
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"the text {prompt[:40]!r} needs a tokenizer: give one, or lists of token ids")
        ids = tuple(tokenizer.encode(prompt))
    else:
        ids = check_ids("prompt_token_ids", prompt)
    config = dataclasses.replace(config, max_model_len=longest(model, config))
    check_prompt(ids, SamplingParams(), model=model, config=config, eos_token_ids=eos)
    return ids


def _shape(
    prompts: Sequence[Sequence[int]], beams: BeamParams, *, model: ModelConfig, config: EngineConfig
) -> tuple[int, int, int]:
    """Prompts at once, and room for the tokens of each and for new ones: powers of two, or exact if that makes them fit."""
    max_len, num_requests = longest(model, config), max(config.max_slots // beams.width, 1)
    longest_prompt = max(map(len, prompts))
    max_tokens = min(beams.max_tokens, max_len - min(map(len, prompts)))
    capacity, max_new = longest_prompt, max_tokens
    for capacity, max_new in (
        (min(_power_of_two(longest_prompt), max_len - 1), min(_power_of_two(max_tokens), max_len - 1)),
        (longest_prompt, max_tokens),
    ):
        each = _pages_per_request(capacity, max_new, beams.width, model=model, config=config)
        if config.num_pages is None or each <= config.num_pages:
            break
    if config.num_pages is not None:
        num_requests = min(num_requests, max(config.num_pages // each, 1))  # `beam_search` refuses what does not fit
    return min(_power_of_two(len(prompts)), num_requests), capacity, max_new


def _power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


def _pages_per_request(capacity: int, max_new: int, width: int, *, model: ModelConfig, config: EngineConfig) -> int:
    max_len = longest(model, config)
    return pages_per_request(capacity, max_new, width=width, max_len=max_len, page_size=config.page_size)


def _check_memory(
    num_requests: int,
    capacity: int,
    max_new: int,
    width: int,
    *,
    params: Params,
    model: ModelConfig,
    config: EngineConfig,
) -> None:
    """Raises ValueError if the device reports less free memory than the pool takes."""
    weight = embedding_of(params)
    num_pages = num_requests * _pages_per_request(capacity, max_new, width, model=model, config=config)
    needed = num_pages * bytes_per_page(model, config.page_size, config.kv_dtype or str(loaded_dtype(params)))
    reported = next(iter(weight.devices())).memory_stats() or {}
    if "bytes_limit" not in reported:
        return
    free = reported["bytes_limit"] - reported.get("bytes_in_use", 0)
    if needed > free:
        raise ValueError(
            f"the {num_pages} pages of {num_requests} prompts searched with width={width} take {needed / 1e6:.1f} MB, but "
            f"{free / 1e6:.1f} MB of the device's memory are free: use a smaller width, fewer tokens or fewer slots, or "
            "give the engine's own pool fewer pages"
        )


@functools.cache
def _program(model: ModelConfig, config: EngineConfig, width: int, platform: str) -> Callable[..., Hypotheses]:
    options = compiler_options(config, platform)
    search = functools.partial(beam_search, model=model, config=config, width=width)
    return jax.jit(search, compiler_options=options)


def _sequences(
    hypotheses: Any,
    prompt: tuple[int, ...],
    eos: tuple[int, ...],
    tokenizer: Tokenizer | None,
    skip_special_tokens: bool,
) -> tuple[BeamSequence, ...]:
    sequences = []
    for index in np.flatnonzero(hypotheses.valid).tolist():
        token_ids = tuple(hypotheses.tokens[index, : hypotheses.length[index]].tolist())
        stopped = token_ids[-1] in eos
        text = ""
        if tokenizer is not None:
            decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip_special_tokens, context=prompt)
            text = "".join(map(decoder.push, token_ids[:-1] if stopped else token_ids)) + decoder.flush()
        sequences.append(
            BeamSequence(
                index=index,
                text=text,
                token_ids=token_ids,
                finish_reason="stop" if stopped else "length",
                cumulative_logprob=float(hypotheses.logprob[index]),
                score=float(hypotheses.score[index]),
            )
        )
    return tuple(sequences)
