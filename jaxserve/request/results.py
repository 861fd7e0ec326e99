"""The results of a request: records of generated tokens, their log probabilities and their times."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token's place in the distribution at a position."""

    logprob: float  # natural logarithm
    rank: int  # 1: most likely
    decoded_token: str | None  # the token's own text, special tokens too; None: detokenize is off


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request, finished or so far."""

    index: int  # index of the sample in its request, 0 .. n - 1
    text: str  # empty if detokenize is off
    token_ids: tuple[int, ...]  # generated tokens, the stop token included
    finish_reason: FinishReason | None = None  # None: not finished
    stop_reason: int | str | tuple[int, ...] | None = (
        None  # stop token, text or token list; None: end-of-sequence, or no stop
    )
    logprobs: tuple[Mapping[int, TokenLogprob], ...] | None = None  # per generated token: token id -> place
    cumulative_logprob: float | None = None  # sum over the generated tokens; None: logprobs is None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """The times of a request's events, in seconds of one monotonic clock."""

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
    seed: int | None = None  # the seed that replays the request; None for greedy requests without a seed
    error: str | None = None  # why the request was refused or failed
    prompt_logprobs: tuple[Mapping[int, TokenLogprob] | None, ...] | None = None  # per prompt token; the first has none

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(output.finish_reason is not None for output in self.outputs)
