"""A request and its samples as the host sees them: what has come back from the device, as text and as a result."""

import dataclasses
import time
from collections.abc import Mapping

import numpy as np

from jaxserve.core.scheduler.state import Status
from jaxserve.request import CompletionOutput, Request, RequestMetrics, RequestOutput, SamplingParams, TokenLogprob
from jaxserve.text.stop_strings import StopScanner
from jaxserve.text.tokenizer import IncrementalDecoder, Tokenizer

_ERROR = (
    "there was no token to draw: the model's logits were not finite (its weights are damaged, or dtype is too narrow for "
    "them: try bfloat16), or allowed_token_ids, bad_words and logit_bias together left none"
)


@dataclasses.dataclass(frozen=True)
class Update:
    """The news of one sample of a request."""

    request_id: str
    text: str  # text to append to the sample's text so far; it is final
    token_ids: tuple[int, ...]  # tokens generated since the last update
    output: RequestOutput | None = None  # the whole result, in the request's last update only
    index: int = 0  # index of the sample in its request


class LiveRequest:
    """A request on its way from acceptance to its result: its samples, and what they have in common.

    Attributes:
      request: the request as it was accepted.
      prompt_token_ids: the prompt as the device gets it, truncated if the request says so.
      params: the parameters as the device gets them, with bad words as token ids.
      seed: the request's own, or the one derived for it.
      abort_requested: whether the next step must end it.
      tokenizer: decodes the samples; None: the results have no text.
      arrival_time: `time.monotonic` when the request was accepted.
      admitted: whether at least one sample has had a slot.
      samples: the samples, by index.
    """

    def __init__(
        self,
        request: Request,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.abort_requested = False
        self.tokenizer = tokenizer if params.detokenize else None
        self.eos_token_ids = eos_token_ids
        self.arrival_time = time.monotonic()
        self.admitted = False
        self.samples = [LiveSample(self, index) for index in range(params.n)]
        self._prompt_logprobs: list[Mapping[int, TokenLogprob] | None] = [None] * len(prompt_token_ids)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def finished(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.finished for sample in self.samples)

    def finish(self, status: Status) -> None:
        """Ends all samples that have not ended."""
        for sample in self.samples:
            sample.finish(status)

    def add_prompt_logprob(
        self, position: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray
    ) -> None:
        """Stores the log probabilities of the prompt token at `position`. After a preemption the same ones come again."""
        num_top, token = self.params.prompt_logprobs or 0, self.prompt_token_ids[position]
        self._prompt_logprobs[position] = self.places(token, logprob, rank, top_ids[:num_top], top_logprobs[:num_top])

    def output(self) -> RequestOutput:
        """Returns the result so far."""
        params, status = self.params, [sample.status for sample in self.samples]
        has_prompt_logprobs = params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.id,
            prompt=self.request.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(sample.completion() for sample in self.samples),
            metrics=self._metrics(),
            error=_ERROR if Status.ERROR in status else None,
            seed=None if params.greedy and params.seed is None else self.seed,
            prompt_logprobs=tuple(self._prompt_logprobs) if has_prompt_logprobs else None,
        )

    def places(
        self, token: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray
    ) -> Mapping[int, TokenLogprob]:
        """Returns the rank and log probability of a token and of the most likely ones, by token id."""
        top = {
            int(top_id): TokenLogprob(float(value), place, self._name(int(top_id)))
            for place, (top_id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1)
            if top_id >= 0
        }
        return {token: TokenLogprob(logprob, rank, self._name(token))} | top

    def _name(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode_token(token)

    def _metrics(self) -> RequestMetrics:
        first = [sample.first_token_time for sample in self.samples if sample.first_token_time is not None]
        last = [sample.finish_time for sample in self.samples if sample.finish_time is not None]
        return RequestMetrics(
            arrival_time=self.arrival_time,
            first_token_time=min(first, default=None),
            finish_time=max(last) if len(last) == len(self.samples) else None,
            num_preemptions=sum(sample.num_preemptions for sample in self.samples),
        )


class LiveSample:
    """One sample of a request: collects its tokens and their text.

    Attributes:
      live: the request.
      index: index of the sample in its request.
      token_ids: tokens generated so far.
      status: the status as of the last call read, or STOP if the host has found a stop string since.
      num_preemptions: number of times that the sample lost its slot.
      first_token_time, last_token_time, finish_time: `time.monotonic` of the first token, of the last call that brought tokens,
        and of the end; None until then.
      end_reported: whether an update has reported the end.
    """

    def __init__(self, live: LiveRequest, index: int) -> None:
        self.live = live
        self.index = index
        self.token_ids: list[int] = []
        self.status = Status.WAITING
        self.num_preemptions = 0
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.finish_time: float | None = None
        params = live.request.params
        self._decoder = self._make_decoder()
        self._scanner = StopScanner(params.stop_strings, include=params.include_stop_str_in_output)
        self._text: list[str] = []
        self._num_reported = 0  # tokens that updates have reported
        self.end_reported = False
        self._unreported: list[str] = []  # text that no update has reported
        self._logprobs: list[Mapping[int, TokenLogprob]] = []
        self._cumulative_logprob = 0.0

    def _make_decoder(self) -> IncrementalDecoder | None:
        if self.live.tokenizer is None:
            return None
        params = self.live.params
        return IncrementalDecoder(
            self.live.tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            context=self.live.prompt_token_ids,
        )

    @property
    def finished(self) -> bool:
        """Whether nothing more will be added."""
        return self.status >= Status.STOP

    def append(
        self, token: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray, status: Status
    ) -> None:
        """Adds one generated token; `status` is the status of the queue row after it.

        A stop string ends the sample here, whatever the status; tokens that come after that are ignored.
        """
        if self.finished:
            return
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        self.token_ids.append(token)
        num_top = self.live.params.logprobs
        if num_top is not None:
            self._cumulative_logprob += logprob
            self._logprobs.append(self.live.places(token, logprob, rank, top_ids[:num_top], top_logprobs[:num_top]))
        if self._decoder is not None and not self._is_stop_token(token, status):
            self._add_text(self._decoder.push(token))
            if self._scanner.matched is not None:
                self._end(Status.STOP)

    def finish(self, status: Status) -> None:
        """Ends the sample for the reason `status`, unless it has ended."""
        if self.finished:
            return
        if self._decoder is not None:
            self._add_text(self._decoder.flush())
            if self._scanner.matched is None:
                self._add_final(self._scanner.flush())
            elif status == Status.LENGTH:
                status = Status.STOP
        self._end(status)

    def _end(self, status: Status) -> None:
        self.status = status
        self.finish_time = time.monotonic()

    def _is_stop_token(self, token: int, status: Status) -> bool:
        """Returns whether the token is one that ends the sequence; such a token has no text."""
        params = self.live.params
        ends = () if params.ignore_eos else self.live.eos_token_ids
        return status == Status.STOP and (token in ends or token in params.stop_token_ids)

    @property
    def has_news(self) -> bool:
        """Whether there are tokens, or an end, that no update has reported."""
        return len(self.token_ids) > self._num_reported or (self.finished and not self.end_reported)

    def take_update(self) -> Update | None:
        """Returns an update with everything since the last one; None if there is no news."""
        if not self.has_news:
            return None
        new, text = tuple(self.token_ids[self._num_reported :]), "".join(self._unreported)
        self._num_reported, self._unreported, self.end_reported = len(self.token_ids), [], self.finished
        last = all(sample.end_reported for sample in self.live.samples)
        output = self.live.output() if last else None
        return Update(self.live.id, text, new, output, self.index)

    def completion(self) -> CompletionOutput:
        """Returns the result so far."""
        has_logprobs = self.live.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.status.finish_reason,
            stop_reason=self._stop_reason(),
            logprobs=tuple(self._logprobs) if has_logprobs else None,
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
        )

    def _add_text(self, text: str) -> None:
        may_stop = len(self.token_ids) >= self.live.params.min_tokens
        self._add_final(self._scanner.push(text, may_stop=may_stop))

    def _add_final(self, text: str) -> None:
        self._text.append(text)
        self._unreported.append(text)

    def _stop_reason(self) -> int | str | tuple[int, ...] | None:
        """Returns the token, string or sequence that ended the sample.

        If several would, it is the first in the order in which the device and the host test them.
        """
        if self.status != Status.STOP:
            return None
        if self._scanner.matched is not None:
            return self._scanner.matched
        last, params = self.token_ids[-1], self.live.params
        if last in self.live.eos_token_ids and not params.ignore_eos:
            return None
        if last in params.stop_token_ids:
            return last
        return next((ids for ids in params.stop_sequences if tuple(self.token_ids[-len(ids) :]) == ids), last)
