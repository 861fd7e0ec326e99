"""The host's side of one sequence: what has come back from the device, as text and as a result."""

import dataclasses
import time
from collections.abc import Mapping

import numpy as np

from jaxserve.request import CompletionOutput, Request, RequestMetrics, RequestOutput, SamplingParams, TokenLogprob
from jaxserve.scheduler.state import Status
from jaxserve.stop_strings import StopScanner
from jaxserve.tokenizer import IncrementalDecoder, Tokenizer

_ERROR = (
    "there was no token to draw: the model's logits were not finite (its weights are damaged, or dtype is too narrow for "
    "them: try bfloat16), or allowed_token_ids, bad_words and logit_bias together left none"
)


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new about a request."""

    request_id: str
    text: str  # to be appended to the text so far; final, never taken back
    token_ids: tuple[int, ...]  # generated since the last update
    output: RequestOutput | None = None  # the whole result, once the request has finished


class Sequence:
    """Collects tokens of one request; made when the request is accepted."""

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
        self.params = params  # as the device has them: bad words are token ids
        self.seed = seed
        self.token_ids: list[int] = []
        self.status = Status.WAITING
        self.num_preemptions = 0
        self.abort_requested = False
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._decoder = self._make_decoder()
        self._scanner = StopScanner(request.params.stop_strings, include=request.params.include_stop_str_in_output)
        self._text: list[str] = []
        self._num_reported = 0  # tokens that an update has had
        self._unreported: list[str] = []  # text that none has had
        self._logprobs: list[Mapping[int, TokenLogprob]] = []
        self._cumulative_logprob = 0.0
        self._arrival_time = time.monotonic()
        self._first_token_time: float | None = None
        self._finish_time: float | None = None

    def _make_decoder(self) -> IncrementalDecoder | None:
        if self._tokenizer is None:
            return None
        params = self.request.params
        return IncrementalDecoder(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            context=self.prompt_token_ids,
        )

    @property
    def finished(self) -> bool:
        """Whether nothing more will be added."""
        return self.status >= Status.STOP

    def append(
        self, token: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray, status: Status
    ) -> None:
        """Takes one generated token; `status` is that of the sequence after it.

        A stop string ends the sequence here, whatever the status; tokens that come after that are not taken.
        """
        if self.finished:
            return
        if self._first_token_time is None:
            self._first_token_time = time.monotonic()
        self.token_ids.append(token)
        if self.request.params.logprobs is not None:
            self._cumulative_logprob += logprob
            self._logprobs.append(self._places(token, logprob, rank, top_ids, top_logprobs))
        if self._decoder is not None and not self._is_stop_token(token, status):
            self._add_text(self._decoder.push(token))
            if self._scanner.matched is not None:
                self._end(Status.STOP)

    def finish(self, status: Status) -> None:
        """Ends the sequence for the reason `status`, unless it has ended."""
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
        self._finish_time = time.monotonic()

    def _is_stop_token(self, token: int, status: Status) -> bool:
        """Whether the token is one that ends the sequence: then it has no text."""
        return status == Status.STOP and (token in self._eos_token_ids or token in self.request.params.stop_token_ids)

    def take_update(self) -> Update | None:
        """What has come since the last call; None if nothing."""
        new, text = tuple(self.token_ids[self._num_reported :]), "".join(self._unreported)
        if not new and not self.finished:
            return None
        self._num_reported, self._unreported = len(self.token_ids), []
        return Update(self.request.id, text, new, self.output() if self.finished else None)

    def output(self) -> RequestOutput:
        """The result so far."""
        params, asked = self.request.params, self.request.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.status.finish_reason,
            stop_reason=self._stop_reason(),
            logprobs=tuple(self._logprobs) if asked else None,
            cumulative_logprob=self._cumulative_logprob if asked else None,
        )
        return RequestOutput(
            request_id=self.request.id,
            prompt=self.request.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=(completion,),
            metrics=RequestMetrics(
                arrival_time=self._arrival_time,
                first_token_time=self._first_token_time,
                finish_time=self._finish_time,
                num_preemptions=self.num_preemptions,
            ),
            error=_ERROR if self.status == Status.ERROR else None,
            seed=None if params.greedy and params.seed is None else self.seed,
        )

    def _add_text(self, text: str) -> None:
        may_stop = len(self.token_ids) >= self.request.params.min_tokens
        self._add_final(self._scanner.push(text, may_stop=may_stop))

    def _add_final(self, text: str) -> None:
        self._text.append(text)
        self._unreported.append(text)

    def _stop_reason(self) -> int | str | tuple[int, ...] | None:
        """The first of what ended the sequence, in the order in which the device and the host test."""
        if self.status != Status.STOP:
            return None
        if self._scanner.matched is not None:
            return self._scanner.matched
        last, params = self.token_ids[-1], self.request.params
        if last in self._eos_token_ids and not params.ignore_eos:
            return None
        if last in params.stop_token_ids:
            return last
        return next((ids for ids in params.stop_sequences if tuple(self.token_ids[-len(ids) :]) == ids), last)

    def _places(
        self, token: int, logprob: float, rank: int, top_ids: np.ndarray, top_logprobs: np.ndarray
    ) -> Mapping[int, TokenLogprob]:
        num_top = self.request.params.logprobs or 0
        sampled = {token: TokenLogprob(logprob, rank, self._name(token))}
        top = {
            int(top_id): TokenLogprob(float(value), place, self._name(int(top_id)))
            for place, (top_id, value) in enumerate(zip(top_ids[:num_top], top_logprobs[:num_top], strict=True), 1)
            if top_id >= 0
        }
        return sampled | top

    def _name(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode_token(token)
