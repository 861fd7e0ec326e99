"""The first stage of a request: it is checked, numbered and tokenised, and its samples become rows for the device."""

import dataclasses
import itertools
from collections.abc import Container, Sequence
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.core.make_submission import check_aux, check_prompt, derived_seed, empty_submission, fill_row, truncated
from jaxserve.core.scheduler import Submission
from jaxserve.engine.live_requests import LiveRequest, LiveSample
from jaxserve.models import ModelConfig
from jaxserve.request import Request, SamplingParams
from jaxserve.text.tokenizer import Tokenizer, spell


class Intake:
    """Checks and tokenises requests. Its methods change only the running number, so any thread may call them.

    Attributes:
      numbers: the running numbers of requests, refused ones included; seeds are derived from them.
      eos_token_ids: ids that end a sequence unless its request sets `ignore_eos`.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        *,
        seed: int,
        aux: Any,
    ) -> None:
        """Takes arguments of the Engine's constructor; all capacities of `config` must be set."""
        self.numbers = itertools.count()
        self._model, self._config = model, config
        self._tokenizer, self.eos_token_ids = tokenizer, eos_token_ids
        self._seed, self._aux = seed, aux

    def accept(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None,
        id: str | None,
        priority: int,
        *,
        in_use: Container[str],
    ) -> LiveRequest:
        """Checks and tokenises a request, and returns a `LiveRequest`.

        Args:
          prompt: text, token ids, or a `Request`; with a `Request` the next three must be left out.
          params, id, priority: the other fields of the request.
          in_use: ids that the request must not have.

        Raises:
          ValueError: if the request is not valid; the message has the value, the rule and the remedy.
        """
        number = next(self.numbers)
        if not isinstance(prompt, Request):
            name = _free_id(number, in_use) if id is None else id
            request = _make_request(prompt, params, name, priority)
        elif params is not None or id is not None or priority:
            raise ValueError(f"request {prompt.id!r} has params, id and priority of its own: leave those arguments out")
        else:
            request = prompt
        if request.id in in_use:
            raise ValueError(f"request id {request.id!r} is in use by an unfinished request: ids must differ")
        if request.params.n > self._config.max_slots:
            raise ValueError(
                f"n={request.params.n} is above max_slots={self._config.max_slots}: ask for fewer samples or raise max_slots"
            )
        if request.aux is not None:
            check_aux(request.aux, self._aux)
        seed = derived_seed(self._seed, number) if request.params.seed is None else request.params.seed
        prompt_token_ids, params = self._prompt_tokens(request), self._spelled(request.params)
        check_prompt(prompt_token_ids, params, model=self._model, config=self._config, eos_token_ids=self.eos_token_ids)
        return LiveRequest(request, prompt_token_ids, params, seed, self._tokenizer, self.eos_token_ids)

    def _prompt_tokens(self, request: Request) -> tuple[int, ...]:
        token_ids = request.prompt_token_ids
        if token_ids is None:
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer: give prompt_token_ids in place of text")
            token_ids = self._tokenizer.encode(request.prompt or "")
        return truncated(token_ids, request.params, self._config)

    def _spelled(self, params: SamplingParams) -> SamplingParams:
        """Returns the parameters with bad words as token ids."""
        if self._tokenizer is None:
            if params.stop_strings:
                raise ValueError(
                    f"stop={params.stop!r} needs a tokenizer, which this engine lacks: give lists of token ids"
                )
            return params
        return dataclasses.replace(params, bad_words=spell(params.bad_words, self._tokenizer))

    def submission(self, samples: Sequence[LiveSample], num_rows: int) -> Submission:
        """Returns a submission of `num_rows` rows: the samples, which must have those of a request adjacent, then padding."""
        rows = empty_submission(num_rows, self._model, self._config, self._aux)
        for index, sample in enumerate(samples):
            live = sample.live
            fill_row(
                rows,
                index,
                live.prompt_token_ids,
                live.params,
                seed=live.seed,
                priority=live.request.priority,
                eos_token_ids=self.eos_token_ids,
                sample_index=sample.index,
                aux=live.request.aux,
            )
        return rows


def _free_id(number: int, in_use: Container[str]) -> str:
    name = f"request-{number}"
    while name in in_use:
        name += "+"
    return name


def _make_request(prompt: str | Sequence[int], params: SamplingParams | None, id: str, priority: int) -> Request:
    fields: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    return Request(id=id, params=SamplingParams() if params is None else params, priority=priority, **fields)
