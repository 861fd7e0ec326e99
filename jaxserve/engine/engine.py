"""The Engine: it takes requests and returns results. Users call it; its parts do the work.

    queue      requests that wait or are unfinished
    driver     the device: weights, state, programs, calls in flight
    loop       one turn: gives waiting samples to the driver, and makes updates of what comes back
    reporter   totals, load, latencies
    mailboxes  updates on their way to the callers that asked for them

`jaxserve.engine.loop` says how calls follow one another and what they cost.
"""

import collections
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from jaxserve.config import EngineConfig
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.engine.beams import BeamParams, BeamSearchOutput, search_beams
from jaxserve.engine.capacity import resolve_capacities
from jaxserve.engine.driver import Driver
from jaxserve.engine.intake import Intake
from jaxserve.engine.live_requests import LiveRequest, Update
from jaxserve.engine.load import load
from jaxserve.engine.loop import Loop
from jaxserve.engine.mailboxes import Mailboxes
from jaxserve.engine.queue import RequestQueue
from jaxserve.engine.reporting import Reporter
from jaxserve.engine.stats import EngineStats
from jaxserve.engine.transport import Observer
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params
from jaxserve.request import Request, RequestOutput, SamplingParams
from jaxserve.text.tokenizer import Tokenizer


class Engine:
    """Serves one model: continuous batching with paged attention, text in and out.

    Attributes:
      model: the model's hyperparameters.
      config: the configuration, with all capacities chosen.
      tokenizer: None if the engine serves token ids only.
      observer: a function that gets the outputs of each call, such as `jaxserve.timeline.record.Timeline.observe`; None: there
        is no observer.
      queue: the requests that wait or are unfinished.
      driver: the device's side.
      reporter: keeps `stats`.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        logits_fn: LogitsFn | None = None,
        aux: Any = None,
    ) -> None:
        """Allocates the KV pool; on a CPU it takes memory only as it is used.

        Args:
          params: weights, as from `nnx.split(Transformer(model))`, on the device that is to serve them. May be replaced by
            `set_params`.
          model: hyperparameters.
          config: capacities; those left at None are chosen here.
          tokenizer: encodes text prompts and decodes results; None: the engine serves token ids only.
          eos_token_ids: end-of-sequence ids.
          seed: seeds of requests without one are derived from it.
          logits_fn: changes the logits that tokens are drawn from; compiled into a program of this engine.
          aux: the initial value of what `logits_fn` remembers of each sequence, a tree of arrays; a request may have its own.

        Raises:
          ValueError: if the longest sequence is longer than the model was made for, or the pool too large.
        """
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must lie in [0, 2^64)")
        self.model = model
        self.config = resolve_capacities(config or EngineConfig(), model, params)
        self.tokenizer = tokenizer
        self.observer: Observer | None = None
        intake = Intake(self.model, self.config, tokenizer, tuple(eos_token_ids), seed=seed, aux=aux)
        self.queue = RequestQueue(intake, self.config.max_waiting)
        self.driver = Driver(params, model, self.config, intake, logits_fn=logits_fn, aux=aux)
        self.reporter = Reporter(self.config)
        self._loop = Loop(self.queue, self.driver, self.reporter, debug_checks=self.config.debug_checks)
        self._mailboxes = Mailboxes()
        self._owner: threading.Thread | None = (
            None  # the only thread that may add requests and step; None: any thread may
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        dtype: str | None = None,
        config: EngineConfig | None = None,
        load_format: str = "auto",
        seed: int = 0,
        logits_fn: LogitsFn | None = None,
        aux: Any = None,
    ) -> Self:
        """Makes an engine for a checkpoint in Hugging Face layout.

        Args:
          path_or_id: a directory, or a model id on the Hugging Face hub, which is downloaded into the hub's cache. With
            load_format "dummy" also a config.json file.
          dtype: "float32", "bfloat16" or "float16"; None: bfloat16 (on CPU too).
          config: capacities.
          load_format: "auto", or "dummy" for random weights and no tokenizer.
          seed: seed of random weights, and of the seeds of requests without one.
          logits_fn, aux: as in the constructor.

        Raises:
          ValueError: if the checkpoint is missing or malformed, or its architecture is not supported.
        """
        loaded = load(
            path_or_id, config or EngineConfig(), dtype=dtype or "bfloat16", load_format=load_format, seed=seed
        )
        return cls(
            loaded.params,
            loaded.model,
            loaded.config,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            seed=seed,
            logits_fn=logits_fn,
            aux=aux,
        )

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Returns results for prompts, in their order.

        Args:
          prompts: texts, or lists of token ids; a single text is one prompt.
          params: parameters for all prompts, or one per prompt; None: the defaults.
          priorities: one per prompt, lower first; None: all alike.

        Raises:
          ValueError: before anything is generated, if a prompt or its parameters are not valid; the message has the
            prompt's index.
        """
        requests = self.queue.accept_all(prompts, params, priorities)
        results = {update.request_id: update.output for update in self._serve(requests) if update.output is not None}
        return [results[live.id] for live in requests]

    def score(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        completions: Sequence[str] | Sequence[Sequence[int]],
    ) -> list[tuple[float, ...]]:
        """Returns the log probability of every token of given completions, under the model's own distribution.

        The same programs compute them that generate, in one batch with all other requests.

        Args:
          prompts: texts, or lists of token ids, at least one each.
          completions: the continuation of each prompt, in the same form; texts are tokenised apart from their prompts.

        Raises:
          ValueError: if there are not as many completions as prompts, or one is not valid or too long; the message has its
            index.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts: give one per prompt")
        starts = [self._encode(prompt, special=True) for prompt in prompts]
        whole = [ids + self._encode(text, special=False) for ids, text in zip(starts, completions, strict=True)]
        results = self.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False))
        return [
            tuple(
                (places or {})[token].logprob
                for token, places in zip(ids[len(start) :], (result.prompt_logprobs or ())[len(start) :], strict=True)
            )
            for start, ids, result in zip(starts, whole, results, strict=True)
        ]

    def beam_search(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], params: BeamParams | None = None
    ) -> list[BeamSearchOutput]:
        """Returns the best continuations that beam search finds, with the rules of transformers' beam search.

        The search has a program and a KV pool of its own, separate from the requests that are being served. The program is
        compiled on first use for each width and, in powers of two, for the lengths and the number of prompts.

        Args:
          prompts: texts, or lists of token ids.
          params: parameters for all prompts; None: the defaults.

        Raises:
          ValueError: if a prompt is not valid (the message has its index), or the beams do not fit.
        """
        return search_beams(
            prompts,
            params or BeamParams(),
            params=self.driver.weights.params,
            model=self.model,
            config=self.config,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
        )

    def serve(self, requests: Iterable[Request], *, steps_per_call: int | None = None) -> Iterator[Update]:
        """Adds requests and yields their updates as they come.

        Other requests go on at the same time; their updates are kept for their own callers. Closing the iterator early aborts
        the requests that are unfinished.

        Args:
          requests: the requests; all are checked before any is added.
          steps_per_call: `max_steps` of each `step`.

        Raises:
          ValueError: on the first `next`, if a request is not valid; none is added then.
        """
        live_by_id: dict[str, LiveRequest] = {}
        for request in requests:
            if request.id in live_by_id:
                raise ValueError(f"request id {request.id!r} is there twice: ids must differ")
            live_by_id[request.id] = self.queue.accept(request)
        yield from self._serve(list(live_by_id.values()), steps_per_call)

    def stream(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        steps_per_call: int | None = None,
    ) -> Iterator[Update]:
        """Adds one request and yields its updates: pieces of text in order, and in the last update the result.

        Other requests go on at the same time, as in `serve`; closing the iterator early aborts the request.

        Args:
          prompt, params, id, priority: as in `add_request`.
          steps_per_call: `max_steps` of each `step`.

        Raises:
          ValueError, QueueFullError: as for `add_request`, on the first `next`.
        """
        self.queue.check_room()
        yield from self._serve([self.queue.accept(prompt, params, id, priority)], steps_per_call)

    def add_request(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Adds a request, which the following calls of `step` serve.

        Args:
          prompt: text, token ids, or a `Request`; leave the other arguments out with a `Request`.
          params: sampling parameters; None: the defaults.
          id: the name of the result; None: the engine chooses one.
          priority: requests with lower numbers go first.

        Returns:
          The request's id.

        Raises:
          ValueError: if the request is not valid, or an unfinished request has the same id.
          QueueFullError: if `max_waiting` requests wait already. This bound does not hold for `generate` and `serve`, whose
            callers keep all their prompts in memory anyway.
        """
        self._check_owner()
        self.queue.check_room()
        live = self.queue.accept(prompt, params, id, priority)
        self.queue.add(live)
        return live.id

    def abort(self, request_id: str) -> None:
        """Ends a request with reason "abort" and the tokens generated so far. Finished and unknown ids have no effect."""
        self.queue.abort(request_id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence unless its request sets `ignore_eos`."""
        return self.queue.intake.eos_token_ids

    @property
    def stats(self) -> EngineStats:
        """Running totals, load and latencies."""
        return self.reporter.stats

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.queue.unfinished)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: unfinished requests, rows that have not ended on the device, a call in flight, or
        updates that have not been taken."""
        return self.has_unfinished or self.driver.has_work or self._mailboxes.has_updates

    def set_params(self, params: Params) -> None:
        """Replaces the weights from the next step on. Nothing is compiled; running sequences keep their keys and values.

        May be called in any thread.

        Raises:
          ValueError: if a leaf is missing, or has another shape or dtype than the old one.
        """
        self.driver.weights = self.driver.weights.replaced(params)

    def reset_stats(self) -> None:
        """Starts the totals and latencies again."""
        self.reporter.reset()

    def claim(self, thread: threading.Thread) -> None:
        """Makes a thread the only one that may add requests and step, until `release`.

        Raises:
          ValueError: if there are requests, or updates that have not been taken, or another thread has claimed the engine.
        """
        if self.has_unfinished or self._mailboxes.has_updates or self._owner is not None:
            raise ValueError(
                "the engine is at work: finish or abort its requests, or close the AsyncEngine that runs it"
            )
        self._owner = thread

    def release(self) -> None:
        """Ends a claim: any thread may add requests and step again."""
        self._owner = None

    def check_max_steps(self, max_steps: int | None) -> int:
        """Returns the most steps that `step(max_steps)` runs.

        Raises:
          ValueError: if `max_steps` is out of range.
        """
        limit = self.config.max_steps_per_call if max_steps is None else max_steps
        if not 1 <= limit <= self.config.max_steps_per_call:
            raise ValueError(
                f"max_steps={max_steps} must lie in [1, max_steps_per_call={self.config.max_steps_per_call}]"
            )
        return limit

    def step(self, max_steps: int | None = None) -> list[Update]:
        """Dispatches one call of up to `max_steps` steps, and returns the updates of the call before it.

        Args:
          max_steps: from 1 to `max_steps_per_call`, which is also the default. With fewer steps updates come sooner.

        Raises:
          ValueError: if `max_steps` is out of range. After any other exception, an interrupt included, all unfinished
            requests are gone and the engine is ready for new ones.
          RuntimeError: if the engine works for an `AsyncEngine`.
        """
        self._mailboxes.put(self._step(max_steps))
        return self._mailboxes.take_all()

    def warm_up(self) -> None:
        """Compiles all programs that are not compiled yet. No request makes the engine compile anything afterwards."""
        self.stats.compile_seconds += self.driver.warm_up()

    def _encode(self, text: str | Sequence[int], *, special: bool) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: give token ids in place of text")
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _serve(self, requests: list[LiveRequest], steps_per_call: int | None = None) -> Iterator[Update]:
        self._check_owner()
        for live in requests:
            self.queue.add(live)
        ids = [live.id for live in requests]
        mailbox, unfinished, alive = self._mailboxes.open(ids), set(ids), collections.deque(requests)
        try:
            while unfinished:
                self._mailboxes.put(self._step(steps_per_call))
                updates = mailbox.copy()
                mailbox.clear()
                while alive and not self.queue.is_unfinished(alive[0]):
                    alive.popleft()
                if not updates and not alive:
                    raise RuntimeError(
                        f"{', '.join(sorted(unfinished))}: the end of these was told to another caller of step, or lost when "
                        "that one failed: serve all requests from one place"
                    )
                for update in updates:
                    if update.output is not None:
                        unfinished.remove(update.request_id)
                    yield update
        finally:
            self._mailboxes.close(mailbox, ids)
            for live in filter(self.queue.is_unfinished, requests):
                self.abort(live.id)

    def _check_owner(self) -> None:
        if self._owner not in (None, threading.current_thread()):
            raise RuntimeError("this engine works for an AsyncEngine: ask that one, or close it first")

    def _step(self, max_steps: int | None) -> list[Update]:
        """Dispatches one call and returns the updates of the one before; updates in mailboxes are not among them."""
        self._check_owner()
        limit = self.check_max_steps(max_steps)
        try:
            self.warm_up()
            start = time.monotonic()
            updates = self._loop.turn(limit, self.observer)
        except BaseException:  # work in flight is lost, and the state may have been donated
            self._mailboxes.clear()
            self._loop.reset()
            raise
        self.stats.busy_seconds += time.monotonic() - start
        return updates
