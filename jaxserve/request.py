"""What a user asks for and what he gets: requests, sampling parameters and results as plain host records.

Fields and defaults are those of vLLM. A field that is not built yet is refused by name, never ignored.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import numpy as np

GREEDY_BELOW = 1e-5  # temperatures under this take the most likely token
MAX_INT32 = 2**31 - 1

FinishReason = Literal["stop", "length", "abort", "error"]


class UnsupportedError(ValueError):
    """A parameter is set that this version does not implement."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Checked at construction; hashable.

    Supported:
      temperature: in [0, 2]; below 1e-5 is greedy, and top_k, top_p and min_p then have no effect.
      top_k: keep the k most likely tokens and ties with the k-th; 0 or -1 (stored as 0): off.
      top_p: in (0, 1]; then keep the most likely tokens that together reach this probability.
      min_p: in [0, 1]; before top_k, drop tokens less likely than this times the most likely one.
      seed: in [0, 2^64); the same seed gives the same tokens, whatever runs beside it. None: chosen by the
        engine and reported in the result.
      max_tokens: tokens to generate at most, at least 1; clipped to what the longest sequence leaves.
      stop_token_ids: generating one of these ends the sequence; it is kept in token_ids and left out of the
        text.
      ignore_eos: whether end-of-sequence tokens are tokens like others.
      logprobs: report this many most likely tokens beside the sampled one, of the distribution before
        temperature; None: report nothing. The engine's `max_logprobs` bounds it.
      detokenize: whether the result has text.
      skip_special_tokens: whether special tokens are left out of the text.
      spaces_between_special_tokens: when False, adjacent added tokens are joined without what the decoder
        would put between them. Without effect on decoders that put nothing there, or where special tokens are
        skipped.

    Known, and refused unless left at the default: n, presence_penalty, frequency_penalty, repetition_penalty,
    logit_bias, allowed_token_ids, bad_words, min_tokens, stop, include_stop_str_in_output, logprobs_mode,
    prompt_logprobs, truncate_prompt_tokens.

    Raises:
      UnsupportedError: if one of the latter is set.
      ValueError: if a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs_mode: str = "raw"
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _check_float("temperature", self.temperature, 0, 2),
            "top_k": max(check_int("top_k", self.top_k, -1), 0),
            "top_p": _check_float("top_p", self.top_p, 0, 1, above=True),
            "min_p": _check_float("min_p", self.min_p, 0, 1),
            "seed": None if self.seed is None else check_int("seed", self.seed, 0, 2**64 - 1),
            "max_tokens": check_int("max_tokens", self.max_tokens, 1),
            "stop_token_ids": check_ids("stop_token_ids", self.stop_token_ids),
            "logprobs": None if self.logprobs is None else check_int("logprobs", self.logprobs, 0),
        }
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"):
            checked[name] = _check_bool(name, getattr(self, name))
        for name in _UNSUPPORTED:
            checked[name] = self._check_default(name)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_default(self, name: str) -> object:
        value, default = getattr(self, name), getattr(type(self), name)
        if isinstance(default, tuple) or name == "logit_bias":
            off = value is None or (not isinstance(value, bool | int | float) and not value)
        else:
            off = type(value) in (type(default), int) and value == default
        if not off:
            raise UnsupportedError(f"{name}={value!r} is not supported yet: leave it at its default, {default!r}")
        return default

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every position."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Parameters from names and values, as read from JSON.

        Raises:
          ValueError: if a name is unknown (the message has the nearest known one), or as the constructor.
        """
        return cls().override(fields)

    def override(self, fields: Mapping[str, Any]) -> Self:
        """A copy with some fields changed; errors as in `from_dict`."""
        for name in fields:
            if name not in self.__dataclass_fields__:
                raise ValueError(unknown_name("sampling parameter", name, self.__dataclass_fields__))
        return dataclasses.replace(self, **fields)


_UNSUPPORTED = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "stop",
    "include_stop_str_in_output",
    "logprobs_mode",
    "prompt_logprobs",
    "truncate_prompt_tokens",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and what to do with it.

    Attributes:
      id: chosen by the user; names the result.
      prompt: text; None if the request came as tokens.
      prompt_token_ids: tokens, at least one; None until the text is encoded. Used as they are if both are
        given.
      params: sampling parameters.
      priority: lower goes first; ties in the order of arrival.
    """

    id: str
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    priority: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"id={self.id!r} must be a string that is not empty")
        _check_text("id", self.id)
        if self.prompt is None and self.prompt_token_ids is None:
            raise ValueError(f"request {self.id!r} has no prompt: give prompt or prompt_token_ids")
        if self.prompt is not None:
            _check_text("prompt", self.prompt)
        if self.prompt_token_ids is not None:
            ids = check_ids("prompt_token_ids", self.prompt_token_ids)
            if not ids:
                raise ValueError("prompt_token_ids=[] must have at least one token id")
            object.__setattr__(self, "prompt_token_ids", ids)
        if not isinstance(self.params, SamplingParams):
            raise ValueError(f"params={self.params!r} must be a SamplingParams")
        object.__setattr__(self, "priority", check_int("priority", self.priority, -MAX_INT32))


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token's place in the distribution at a position."""

    logprob: float  # natural logarithm
    rank: int  # 1: most likely
    decoded_token: str | None  # the token's own text, special tokens too; None: detokenize is off


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request, finished or so far."""

    index: int  # which sample of the request; 0 .. n - 1
    text: str  # empty if detokenize is off
    token_ids: tuple[int, ...]  # generated, the stop token included
    finish_reason: FinishReason | None = None  # None: not finished
    stop_reason: int | str | None = None  # the stop token id; None if end-of-sequence or not a stop
    logprobs: tuple[Mapping[int, TokenLogprob], ...] | None = None  # per generated token: token id -> place
    cumulative_logprob: float | None = None  # sum over the generated tokens; None: logprobs is None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, seconds on one monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None  # None: no token yet
    finish_time: float | None = None  # None: not finished
    num_preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """The result of a request, finished or so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics | None = None  # None: refused before it arrived
    seed: int | None = None  # what replays the request; None for greedy requests without one
    error: str | None = None  # why the request was refused or failed

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(output.finish_reason is not None for output in self.outputs)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence that refuses an unknown field, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown {kind} {name!r}: {remedy}"


def _check_float(name: str, value: object, low: float, high: float, above: bool = False) -> float:
    rule = f"must be a number in {'(' if above else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} {rule}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # The device has float32: 1e-46 is 0 there.
    if not (low <= number <= high) or (above and np.float32(number) == low) or math.isnan(number):
        raise ValueError(f"{name}={value!r} {rule}")
    return number


def check_int(name: str, value: object, low: int, high: int = MAX_INT32) -> int:
    """The integer, of any integral type; ValueError if it is none or out of range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")
    return int(value)


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")
    return value


def check_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids as a tuple; ValueError if `value` is no list of integers from 0 on."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of token ids")
    return tuple(check_int(f"{name}[{i}]", token, 0) for i, token in enumerate(value))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a surrogate pair at character {error.start}: it must be valid Unicode"
        ) from None
