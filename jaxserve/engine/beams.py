"""Beam search for users: checks and tokenises prompts, calls the pure `jaxserve.core.beam_search`, and decodes the results."""

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
from jaxserve.engine.capacity import free_bytes, platform_of
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, embedding_of, loaded_dtype
from jaxserve.request import SamplingParams, check_ids, check_int
from jaxserve.text.tokenizer import IncrementalDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class BeamParams:
    """The parameters of a beam search, with the meanings of transformers' `generate`; they are checked at construction.

    Attributes:
      width: beams per prompt (`num_beams`); 1 is greedy search.
      max_tokens: most tokens to generate (`max_new_tokens`); the longest sequence that fits lowers it.
      length_penalty: exponent of the length in a score: log probability / number of tokens ** length_penalty, where the
        end-of-sequence token counts. Values above 0 favour long hypotheses.
      early_stopping: when a search ends that has `width` finished hypotheses. True: at once. False: when no running beam has
        a better score now than the worst of them. "never": when no running beam can reach a better score; if
        length_penalty > 0, the length that counts for this is `max_tokens`.
      num_return: number of hypotheses returned per prompt (`num_return_sequences`), the best ones; at most `width`.
      eos_token_ids: ids that end a hypothesis. None: the model's own; (): no id ends one.
      skip_special_tokens: whether special tokens are left out of the texts.

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
    """One hypothesis: a generated sequence and its score."""

    index: int  # place among the prompt's hypotheses; 0 is the best
    text: str  # without the end-of-sequence token; empty if there is no tokenizer
    token_ids: tuple[int, ...]  # generated tokens, including the end-of-sequence token
    finish_reason: Literal["stop", "length"]
    cumulative_logprob: float  # sum over the tokens
    score: float  # cumulative_logprob / number of tokens ** length_penalty


@dataclasses.dataclass(frozen=True)
class BeamSearchOutput:
    """The hypotheses of one prompt."""

    prompt: str | None  # None if the prompt was given as tokens
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
    """Returns the best continuations of each prompt, in the order of the prompts.

    One pass searches as many prompts as `config.max_slots` beams and, if it is set, `config.num_pages` allow. The call makes a
    KV pool of its own, in addition to an engine's, no larger than the beams can need. A program is compiled for each width and
    each combination of longest prompt, `max_tokens` and number of prompts, all three rounded up to powers of two; other
    parameters compile nothing.

    Args:
      prompts: texts, or lists of token ids; a single text is one prompt.
      beams: parameters for all prompts; None: the defaults.
      params: weights, as from `nnx.split(Transformer(model))`.
      model: hyperparameters.
      config: capacities, page size and backend; None stands for the default of the platform that the weights are on.
      tokenizer: encodes text prompts and decodes the results; None: prompts must be token ids, and texts are empty.
      eos_token_ids: the model's own end-of-sequence ids.

    Raises:
      ValueError: before anything is generated, if a prompt is not valid (the message has its index), or the beams or pages
        of one prompt do not fit.
    """
    beams, platform = beams or BeamParams(), platform_of(embedding_of(params))
    config = dataclasses.replace(config, attention_backend=config.backend_on(platform))
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
    search = _program(model, config, beams.width, platform)
    outputs: list[BeamSearchOutput] = []
    for first in range(0, len(encoded), num_requests):
        some = encoded[first : first + num_requests]
        rows = np.zeros((num_requests, capacity), np.int32)
        lengths = np.zeros(num_requests, np.int32)  # 0: no request
        for row, prompt in enumerate(some):
            rows[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        rules = make_beam_rules(beams, lengths, eos, max_new=max_new, model=model, config=config)
        results = jax.device_get(search(params, rows, lengths, rules))
        for row, prompt in enumerate(some):
            text = texts[first + row]
            hypotheses = jax.tree.map(lambda leaf, row=row: leaf[row, : beams.num_return], results)
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
    """Returns rules for `beam_search` as host arrays, one entry per prompt.

    Args:
      beams: parameters for all prompts.
      prompt_lengths: tokens of each prompt, which decide how many tokens may follow; 0: the entry has no prompt.
      eos_token_ids: end-of-sequence ids to use if `beams.eos_token_ids` is None.
      max_new: number of columns for new tokens, at least as many as any prompt may get; None: `beams.max_tokens`.
      model: bounds the longest sequence.
      config: bounds the longest sequence too; `max_stop_token_ids` is the number of columns for end-of-sequence ids.

    Raises:
      ValueError: if `beams` has end-of-sequence ids outside the vocabulary or more of them than there are columns, or if
        `max_new` is too small.
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
    reachable = _divisors(beams.length_penalty, min(beams.max_tokens, max_new))
    divisor[:, : len(reachable)] = reachable
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
    """Returns length ** length_penalty for lengths 0 .. max_new, rounded to float32 once as in transformers; [0] is unused."""
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
    """Returns the number of prompts per pass, and the most prompt tokens and new tokens of one.

    All are powers of two; the numbers of tokens are exact where powers of two need too many pages.
    """
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
    """Returns the smallest power of two that is at least `number`."""
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
    num_pages = num_requests * _pages_per_request(capacity, max_new, width, model=model, config=config)
    needed = num_pages * bytes_per_page(model, config.page_size, config.kv_dtype or str(loaded_dtype(params)))
    free = free_bytes(embedding_of(params))
    if free is not None and needed > free:
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
