"""What a user asks for and what he gets: requests, sampling parameters and results as plain host records.

Fields and defaults are those of vLLM.
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


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Checked at construction; hashable.

    What changes the logits, in this order:
      allowed_token_ids: only these may be drawn; None: all.
      bad_words: texts that are never completed: the last token of each way to spell one is not drawn where the tokens before
        it stand already, in the prompt too. A list of token ids counts as one way.
      min_tokens: end-of-sequence and stop tokens are not drawn before that many, and nothing else stops the sequence.
      logit_bias: token id to what is added to its logit, clamped to [-100, 100]; stored as pairs.
      repetition_penalty: above 0; logits of tokens in prompt or output are divided by it if positive, else multiplied.
      frequency_penalty: in [-2, 2]; subtracted for every time the token was generated.
      presence_penalty: in [-2, 2]; subtracted if the token was generated.

    How a token is drawn:
      temperature: in [0, 2]; below 1e-5 is greedy, and top_k, top_p and min_p then have no effect.
      min_p: in [0, 1]; drop tokens less likely than this times the most likely one.
      top_k: keep the k most likely tokens and ties with the k-th; 0 or -1 (stored as 0): off.
      top_p: in (0, 1]; then keep the most likely tokens that together reach this probability.
      seed: in [0, 2^64); the same seed gives the same tokens, whatever runs beside it. None: chosen by the
        engine and reported in the result.
      n: samples of the prompt, drawn independently; sample i of a seed is always the same. Greedy ones would be alike, so
        temperature must not be 0.

    When it stops, checked in this order:
      ignore_eos: whether end-of-sequence tokens are tokens like others.
      stop_token_ids: generating one of these ends the sequence; it is kept in token_ids and left out of the
        text.
      stop: texts, or lists of token ids, that end the sequence. A list is matched token by token; a text wherever it shows in
        the output, and the earliest to be completed wins, in the order of the list. It is cut off the text.
      include_stop_str_in_output: whether the stop text is left in.
      max_tokens: tokens to generate at most, at least 1; clipped to what the longest sequence leaves.

    What is reported:
      logprobs: this many most likely tokens beside the sampled one, with ranks; None: nothing. The engine's `max_logprobs`
        bounds it.
      logprobs_mode: "raw": of the model's distribution; "processed": of the one that is drawn from. Tokens of probability 0
        are left out.
      prompt_logprobs: the same for each prompt token, raw; the first has none. None: nothing.
      detokenize: whether the result has text.
      skip_special_tokens: whether special tokens are left out of the text.
      spaces_between_special_tokens: when False, adjacent added tokens are joined without what the decoder
        would put between them. Without effect on decoders that put nothing there, or where special tokens are
        skipped.

    And truncate_prompt_tokens: only that many last tokens of the prompt are used; -1: as many as leave room for one token;
    None: all.

    Raises:
      ValueError: if a value has the wrong type or is out of range, or values contradict each other.
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
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop: tuple[str | tuple[int, ...], ...] = ()
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
            "n": check_int("n", self.n, 1),
            "presence_penalty": _check_float("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _check_float("frequency_penalty", self.frequency_penalty, -2, 2),
            "repetition_penalty": _check_float(
                "repetition_penalty", self.repetition_penalty, 0, _MAX_FLOAT32, above=True
            ),
            "logit_bias": _check_bias(self.logit_bias),
            "allowed_token_ids": _check_allowed(self.allowed_token_ids),
            "bad_words": _check_texts("bad_words", self.bad_words),
            "max_tokens": check_int("max_tokens", self.max_tokens, 1),
            "min_tokens": check_int("min_tokens", self.min_tokens, 0),
            "stop": _check_texts("stop", self.stop),
            "stop_token_ids": check_ids("stop_token_ids", self.stop_token_ids),
        }
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            checked[name] = None if value is None else check_int(name, value, 0)
        for name in _SWITCHES:
            checked[name] = _check_bool(name, getattr(self, name))
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            checked["truncate_prompt_tokens"] = check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.logprobs_mode not in ("raw", "processed"):
            raise ValueError(f"logprobs_mode={self.logprobs_mode!r} must be raw or processed")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.n > 1 and self.greedy:
            raise ValueError(
                f"n={self.n} with temperature={self.temperature} would give the same sample {self.n} times: "
                "use n=1 or a higher temperature"
            )
        if self.stop_strings and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} needs text: leave detokenize on, or give token ids")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts in `stop`."""
        return tuple(entry for entry in self.stop if isinstance(entry, str))

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        """The lists of token ids in `stop`."""
        return tuple(entry for entry in self.stop if not isinstance(entry, str))

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


_SWITCHES = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_BIAS = 100.0


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
      aux: where the engine's `logits_fn` starts for this request; None: as the engine was told.
    """

    id: str
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    priority: int = 0
    aux: Any = None

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
    stop_reason: int | str | tuple[int, ...] | None = (
        None  # stop token, text or token list; None: end-of-sequence, or no stop
    )
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
    prompt_logprobs: tuple[Mapping[int, TokenLogprob] | None, ...] | None = None  # per prompt token; the first has none

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


def _check_allowed(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = tuple(dict.fromkeys(check_ids("allowed_token_ids", value)))
    if not ids:
        raise ValueError("allowed_token_ids=[] leaves no token to draw: give some, or None for all")
    return ids


def _check_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their ids. Keys may be strings of digits, as in JSON."""
    given: Any = () if value is None else value
    try:
        pairs: list[tuple[Any, Any]] = list(given.items()) if isinstance(given, Mapping) else [(a, b) for a, b in given]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={value!r} must be a mapping from token ids to numbers") from None
    bias: dict[int, float] = {}
    for key, amount in pairs:
        token = check_int("logit_bias key", int(key) if isinstance(key, str) and key.isdecimal() else key, 0)
        if token in bias:
            raise ValueError(f"logit_bias has token id {token} twice")
        number = _check_float(f"logit_bias[{token}]", amount, -_MAX_FLOAT32, _MAX_FLOAT32)
        bias[token] = min(max(number, -_MAX_BIAS), _MAX_BIAS)
    return tuple(sorted(bias.items()))


def _check_texts(name: str, value: object) -> tuple[str | tuple[int, ...], ...]:
    """Texts, or lists of token ids; a single text is a list of one."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of strings, or of lists of token ids")
    entries: list[str | tuple[int, ...]] = []
    for index, entry in enumerate(value):
        label = f"{name}[{index}]"
        if isinstance(entry, str):
            _check_text(label, entry)
            entries.append(entry)
        else:
            entries.append(check_ids(label, entry))
        if not entries[-1]:
            raise ValueError(f"{label}={entry!r} must not be empty")
    return tuple(entries)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a surrogate pair at character {error.start}: it must be valid Unicode"
        ) from None
