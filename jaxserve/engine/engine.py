"""The Engine: requests in, results out. The one mutable object; it drives two compiled programs and reads outputs back.

    host queue --- update ---> queue rows --- run_steps ---> outputs --- process ---> updates, results
    (bounded)     (collect, abort, submit)    (up to n steps)       (text, stop reasons)

One call is kept in flight: while the device works on a call, the host reads the output of the one before. A row that
finishes is collected with the next `update`, so Q, the queue rows, is a multiple of the slots: waiting rows fill the slots.

What the host asks of the device, per call of `Engine.step`: one `run_steps`, before it one `update` if anything was submitted,
collected or aborted, and one read, of all that the call before has put out. So with n steps per call (`max_steps_per_call`) and
s decoding samples it is at most 2 / (n s) device calls and 1 / (n s) reads per generated token; `EngineStats` counts both.
A call is cut short, and costs that much more per token, when a sample finishes and none waits for its slot.
"""

import collections
import dataclasses
import heapq
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.core.forward import PromptLogprobs
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.make_submission import one_per_prompt
from jaxserve.core.programs import Changes
from jaxserve.core.scheduler import Handles, Status, check_invariants
from jaxserve.core.step import StepOutputs
from jaxserve.engine.beams import BeamParams, BeamSearchOutput, search_beams
from jaxserve.engine.capacity import resolve_capacities
from jaxserve.engine.intake import Intake
from jaxserve.engine.live_requests import LiveRequest, LiveSample, Update
from jaxserve.engine.memory import keep_buffers, release_zeros, trim
from jaxserve.engine.readback import Observer, take_prompt_logprobs, take_tokens
from jaxserve.engine.stats import EngineStats
from jaxserve.engine.transport import PackedOutputs, Reader, engine_programs
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, prepare, prepare_and_free, unprepared
from jaxserve.request import MAX_INT32, Request, RequestOutput, SamplingParams
from jaxserve.text.tokenizer import Tokenizer, load_eos_token_ids, load_tokenizer


class QueueFullError(RuntimeError):
    """As many requests wait as may: this one was not taken."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call in flight."""

    dispatch_time: float
    submitted: list[LiveSample]
    handles: Handles | None  # of `submitted`
    outputs: PackedOutputs


class Engine:
    """Serves one model: continuous batching with paged attention, text in and out.

    Attributes:
      model: the model's hyperparameters.
      config: the configuration, with all capacities chosen.
      tokenizer: None if the engine serves token ids only.
      stats: running totals, load and latencies.
      observer: is told of every call that is read, such as `jaxserve.timeline.record.Timeline.observe`; None: nobody.
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
        """Allocates the KV pool, which on a CPU takes up memory as it is used.

        Args:
          params: weights, as from `nnx.split(Transformer(model))`, on the device. May be replaced by `set_params`.
          model: hyperparameters.
          config: capacities; those left at None are chosen here.
          tokenizer: for text prompts and text results.
          eos_token_ids: end-of-sequence ids.
          seed: seeds of requests without one are derived from it.
          logits_fn: changes the logits that tokens are drawn from; compiled into the engine's programs.
          aux: what it starts with for each sequence, a tree of arrays; a request may have its own.

        Raises:
          ValueError: if the longest sequence is longer than the model was made for, or the pool too large.
        """
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must lie in [0, 2^64)")
        self.model = model
        self.config = resolve_capacities(config or EngineConfig(), model, params)
        self.tokenizer = tokenizer
        self._intake = Intake(self.model, self.config, tokenizer, tuple(eos_token_ids), seed=seed, aux=aux)
        self._unprepared = unprepared(params, model)
        self._weights = _Weights(prepare(_commit(params), model, self.config.backend, self.config.weight_dtype))
        self._num_added = 0
        self._last_read_time = 0.0
        self._driver: int | None = None  # the thread that alone may add requests and step; None: any
        self._programs = engine_programs(model, self.config, logits_fn, self._weights.structure)
        self._reader = Reader(self.config)
        self._aux = aux
        self._undelivered: list[Update] = []  # of requests that another caller of `serve` waits for
        self._reset()
        self._warm = False
        self.stats = EngineStats(self.config.max_slots, self.config.num_pages or 0)
        self.observer: Observer | None = None

    def _reset(self) -> None:
        """Forgets all requests, and everything on the device but the weights."""
        self._state = jax.device_put(self._programs["init"](aux=self._aux), _replicated(self._weights))
        release_zeros(jax.tree.leaves((self._state.pool, self._state.seen)))
        self._waiting: list[
            tuple[int, int, LiveRequest]
        ] = []  # not on the device yet: a heap of (priority, number, ...)
        self._unfinished: dict[str, LiveRequest] = {}
        self._by_row: dict[int, LiveSample] = {}
        self._generation: Any = np.zeros(self.config.queue_size, np.int32)  # of rows in `_by_row` and `_to_collect`
        self._to_collect: list[int] = []  # finished rows
        self._num_on_device = 0  # rows that are not free
        self._num_aborts = 0  # requested since the last step
        self._calls: collections.deque[_Call] = collections.deque()

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
        """An engine for a checkpoint in Hugging Face layout.

        Args:
          path_or_id: a directory, or a model id on the Hugging Face hub, which is downloaded into the hub's cache. With
            load_format "dummy" also a config.json file.
          dtype: "float32", "bfloat16" or "float16"; None: bfloat16 (on CPU too).
          config: capacities.
          load_format: "auto", or "dummy" for random weights and no tokenizer.
          seed: for random weights, and for requests without a seed.
          logits_fn, aux: as in the constructor.

        Raises:
          ValueError: if the checkpoint is not there, malformed, or of an architecture that is not supported.
        """
        from jaxserve.models import checkpoint, families
        from jaxserve.models import params as weights

        dtype = dtype or "bfloat16"

        def engine(params: Params, model: ModelConfig, **options: Any) -> Self:
            chosen = resolve_capacities(config or EngineConfig(), model, params)
            params = prepare_and_free(params, model, chosen.backend, chosen.weight_dtype)
            return cls(params, model, chosen, seed=seed, logits_fn=logits_fn, aux=aux, **options)

        if load_format == "dummy":
            model = families.read_model_config(path_or_id)
            return engine(weights.random_params(model, seed, dtype), model)
        if load_format != "auto":
            raise ValueError(f"load_format={load_format!r} must be auto or dummy")
        directory = checkpoint.resolve_model(path_or_id)
        model = families.read_model_config(directory)
        tokenizer = load_tokenizer(directory)
        eos_token_ids = load_eos_token_ids(directory)
        params = checkpoint.load_hugging_face(directory, model, dtype=dtype)
        return engine(params, model, tokenizer=tokenizer, eos_token_ids=eos_token_ids)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Results for prompts, in their order.

        Args:
          prompts: texts, or lists of token ids; a single text is one prompt.
          params: for all prompts, or one per prompt; None: the defaults.
          priorities: one per prompt, lower first; None: all alike.

        Raises:
          ValueError: before anything is generated, if a prompt or its parameters are not valid; the message has the
            prompt's index.
        """
        groups = self._accept_all(prompts, params, priorities)
        results = {update.request_id: update.output for update in self._serve(groups) if update.output is not None}
        return [results[group.request.id] for group in groups]

    def _accept_all(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priorities: Sequence[int] | None,
    ) -> list[LiveRequest]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        groups = []
        for index, (prompt, (wanted, priority)) in enumerate(
            zip(texts, one_per_prompt(len(texts), params, priorities), strict=True)
        ):
            try:
                groups.append(self._accept(prompt, wanted, None, priority))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return groups

    def score(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        completions: Sequence[str] | Sequence[Sequence[int]],
    ) -> list[tuple[float, ...]]:
        """Log probabilities of given completions, token by token, of the model's own distribution.

        They come from the programs that generate, in one batch with whatever else is being served.

        Args:
          prompts: texts, or lists of token ids, at least one each.
          completions: what follows each prompt, in the same form; texts are tokenised apart from their prompts.

        Raises:
          ValueError: if there are not as many completions as prompts, or one is not valid or too long; the message has its
            index.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts: give one per prompt")
        known = [self._encoded(prompt, special=True) for prompt in prompts]
        whole = [ids + self._encoded(text, special=False) for ids, text in zip(known, completions, strict=True)]
        results = self.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False))
        return [
            tuple(
                (places or {})[token].logprob
                for token, places in zip(ids[len(start) :], (result.prompt_logprobs or ())[len(start) :], strict=True)
            )
            for start, ids, result in zip(known, whole, results, strict=True)
        ]

    def beam_search(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], params: BeamParams | None = None
    ) -> list[BeamSearchOutput]:
        """The best continuations that a search over beams finds, as transformers finds them.

        It is a program of its own with a pool of its own, beside the requests being served, and compiled on first use for
        its width and, in powers of two, the lengths.

        Args:
          prompts: texts, or lists of token ids.
          params: for all prompts; None: the defaults.

        Raises:
          ValueError: if a prompt is not valid, or the beams do not fit; the message has the prompt's index.
        """
        return search_beams(
            prompts,
            params or BeamParams(),
            params=self._weights.params,
            model=self.model,
            config=self.config,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
        )

    def _encoded(self, text: str | Sequence[int], *, special: bool) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: give token ids in place of text")
        return self.tokenizer.encode(text, add_special_tokens=special)

    def serve(self, requests: Iterable[Request], *, steps_per_call: int | None = None) -> Iterator[Update]:
        """Adds requests and yields what becomes of them as it comes.

        Other requests go on beside them; their updates are kept for whoever asks for them. Closing the iterator early
        aborts what is unfinished.

        Args:
          requests: checked all before any is added.
          steps_per_call: as `step`'s `max_steps`.

        Raises:
          ValueError: on the first `next`, if a request is not valid; none is added then.
        """
        groups: dict[str, LiveRequest] = {}
        for request in requests:
            if request.id in groups:
                raise ValueError(f"request id {request.id!r} is there twice: ids must differ")
            groups[request.id] = self._accept(request)
        yield from self._serve(list(groups.values()), steps_per_call)

    def _serve(self, groups: list[LiveRequest], steps_per_call: int | None = None) -> Iterator[Update]:
        for group in groups:
            self._enqueue(group)
        unfinished = {group.request.id for group in groups}
        try:
            while unfinished:
                updates = self.step(steps_per_call)
                if unfinished.isdisjoint([*self._unfinished, *(update.request_id for update in updates)]):
                    raise RuntimeError(
                        f"{', '.join(sorted(unfinished))}: the end of these was told to another caller of step, or lost when "
                        "that one failed: serve all requests from one place"
                    )
                self._undelivered += [update for update in updates if update.request_id not in unfinished]
                for update in updates:
                    if update.request_id in unfinished:
                        if update.output is not None:
                            unfinished.remove(update.request_id)
                        yield update
        finally:
            for request_id in unfinished:
                self.abort(request_id)

    def stream(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        steps_per_call: int | None = None,
    ) -> Iterator[Update]:
        """Adds one request and yields what becomes of it: texts to be put together, and in the last update the result.

        Other requests go on beside it, as in `serve`; closing the iterator early aborts the request.

        Args:
          prompt, params, id, priority: as in `add_request`.
          steps_per_call: as `step`'s `max_steps`.

        Raises:
          ValueError, QueueFullError: on the first `next`, as `add_request`.
        """
        group = self._accept(prompt, params, id, priority)
        self._check_room()
        yield from self._serve([group], steps_per_call)

    def add_request(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Accepts a request; `step` works on it.

        Args:
          prompt: text, token ids, or a whole request; with that, leave the others out.
          params: None: the defaults.
          id: names the result; None: one is made up.
          priority: lower goes first.

        Returns:
          The request's id.

        Raises:
          ValueError: if it is not valid, or its id is that of an unfinished request.
          QueueFullError: if `max_waiting` requests wait already. The prompts of `generate` and `serve`, which their caller
            holds anyway, are taken all the same.
        """
        group = self._accept(prompt, params, id, priority)
        self._check_room()
        self._enqueue(group)
        return group.request.id

    def _num_free_places(self, num_coming: int = 0) -> int:
        """Of the queue, when `num_coming` more are in it."""
        bound = self.config.max_waiting
        return MAX_INT32 if bound is None else bound - num_coming - len(self._waiting)

    def _check_room(self, num_coming: int = 0) -> None:
        if self._num_free_places(num_coming) <= 0:
            raise QueueFullError(
                f"{num_coming + len(self._waiting)} requests wait, and no more than max_waiting={self.config.max_waiting} "
                "may: add this one again when some have been admitted, or raise max_waiting in EngineConfig"
            )

    def _accept(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        id: str | None = None,
        priority: int = 0,
    ) -> LiveRequest:
        """Checks a request. May be called in any thread: nothing is added yet."""
        return self._intake.accept(prompt, params, id, priority, in_use=self._unfinished)

    def _check_driver(self) -> None:
        if self._driver not in (None, threading.get_ident()):
            raise RuntimeError("this engine works for an AsyncEngine: ask that one, or close it first")

    def _enqueue(self, group: LiveRequest) -> None:
        self._check_driver()
        self._unfinished[group.request.id] = group
        heapq.heappush(self._waiting, (group.request.priority, self._num_added, group))
        self._num_added += 1

    def abort(self, request_id: str) -> None:
        """Ends a request with reason "abort" and what it has generated by then. Finished and unknown ones: no effect."""
        group = self._unfinished.get(request_id)
        if group is not None:
            group.abort_requested = True
            self._num_aborts += 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a sequence unless a request sets `ignore_eos`."""
        return self._intake.eos_token_ids

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._unfinished)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, rows that the device is yet to end, or a call in flight."""
        return bool(self._unfinished or self._by_row or self._calls or self._undelivered)

    def set_params(self, params: Params) -> None:
        """New weights, from the next step on. Nothing is compiled; running sequences keep their keys and values.

        May be called in any thread.

        Raises:
          ValueError: if a leaf is missing, or has another shape or dtype than the old one.
        """
        old, new = (jax.tree_util.tree_flatten_with_path(tree) for tree in (self._unprepared, params))
        if old[1] != new[1]:
            raise ValueError("the new weights have another structure than the old ones: they must be of the same model")
        for (path, old_leaf), (_, leaf) in zip(old[0], new[0], strict=True):
            if (old_leaf.shape, old_leaf.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, but the engine was made for "
                    f"{old_leaf.dtype}{list(old_leaf.shape)}: convert it first"
                )
        params = prepare(params, self.model, self.config.backend, self.config.weight_dtype)
        self._weights = _Weights(jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, self._weights.params)))

    def reset_stats(self) -> None:
        """Starts the totals and latencies again."""
        old = self.stats
        self.stats = EngineStats(
            old.max_slots,
            old.num_pages,
            num_running=old.num_running,
            num_waiting=old.num_waiting,
            num_used_pages=old.num_used_pages,
        )

    def step(self, max_steps: int | None = None) -> list[Update]:
        """Dispatches one call of up to `max_steps` steps, and returns what the call before it did.

        Args:
          max_steps: at least 1, at most `max_steps_per_call` (also the default). Fewer give updates sooner.

        Raises:
          ValueError: if `max_steps` is out of range. After any other exception, an interrupt included, all unfinished
            requests are gone and the engine is ready for new ones.
          RuntimeError: if the engine works for an `AsyncEngine`.
        """
        self._check_driver()
        limit = self._checked_steps(max_steps)
        updates, self._undelivered = self._undelivered, []
        try:
            self.warm_up()
            start = time.monotonic()
            updates += self._turn(limit)
        except BaseException:  # work in flight is lost, and the state may have been donated
            self._reset()
            self.stats.num_running = self.stats.num_waiting = self.stats.num_used_pages = 0
            raise
        self.stats.busy_seconds += time.monotonic() - start
        return updates

    def _checked_steps(self, max_steps: int | None) -> int:
        limit = self.config.max_steps_per_call if max_steps is None else max_steps
        if not 1 <= limit <= self.config.max_steps_per_call:
            raise ValueError(
                f"max_steps={max_steps} must lie in [1, max_steps_per_call={self.config.max_steps_per_call}]"
            )
        return limit

    def _turn(self, limit: int) -> list[Update]:
        updates = self._abort_waiting()
        depth = 0  # calls in flight when this returns
        if self._unfinished or self._by_row:
            self._dispatch(1 if self.config.debug_checks else limit)
            depth = 0 if self.config.debug_checks else 1
        while len(self._calls) > depth:
            updates += self._process(self._calls.popleft())
        self._count_waiting()
        if self.config.debug_checks:
            check_invariants(self._state)
        return updates

    def warm_up(self) -> None:
        """Compiles all programs, unless that was done: nothing is compiled afterwards, whatever the requests."""
        if self._warm:
            return
        start = time.monotonic()
        changes = self._changes([], [], [])
        for _ in range(2):  # where weights are sharded, the state that comes back may lie otherwise than the first one
            self._state, handles = self._programs["update"](self._state, changes)
            self._state, outputs = self._programs["run_steps"](self._weights.leaves, self._state, np.int32(0))
            jax.device_get((handles, self._readable(outputs)))
        trim()
        if next(iter(self._weights.leaves[0].devices())).platform == "cpu":
            keep_buffers()
        self._warm = True
        self.stats.compile_seconds = time.monotonic() - start

    def _abort_waiting(self) -> list[Update]:
        """Ends aborted requests that the device has not seen."""
        if not self._num_aborts:
            return []
        self._num_aborts = 0
        aborted = [group for _, _, group in self._waiting if group.abort_requested]
        self._waiting = [entry for entry in self._waiting if not entry[2].abort_requested]
        heapq.heapify(self._waiting)
        for group in aborted:
            group.finish(Status.ABORT)
            self._finish(group)
        updates = (sequence.take_update() for group in aborted for sequence in group.samples)
        return [update for update in updates if update is not None]

    def _dispatch(self, max_steps: int) -> None:
        # Those that ended with a stop string run on until the device hears of it.
        aborted = [row for row, sequence in self._by_row.items() if sequence.group.abort_requested or sequence.finished]
        num_free = self.config.queue_size - self._num_on_device + len(self._to_collect)
        room = min(num_free, self.config.max_slots)
        submitted: list[LiveSample] = []
        while self._waiting and len(submitted) + self._waiting[0][2].params.n <= room:
            submitted += heapq.heappop(self._waiting)[2].samples
        handles = None
        if submitted or aborted or self._to_collect:
            changes = self._changes(submitted, self._to_collect, aborted)
            self._num_on_device += len(submitted) - len(self._to_collect)
            self._to_collect = []
            self._state, handles = self._programs["update"](self._state, changes)
            self.stats.num_device_calls += 1
        self._state, outputs = self._programs["run_steps"](self._weights.leaves, self._state, np.int32(max_steps))
        self.stats.num_device_calls += 1
        self._calls.append(_Call(time.monotonic(), submitted, handles if submitted else None, outputs))

    def _changes(self, submitted: list[LiveSample], collected: list[int], aborted: list[int]) -> Changes:
        return Changes(
            submission=self._intake.submission(submitted),
            collected=self._mask(collected),
            aborted=self._mask(aborted),
            generation=self._generation.copy(),
        )

    def _mask(self, rows: Any) -> Any:
        mask = np.zeros(self.config.queue_size, bool)
        mask[rows] = True
        return mask

    def _process(self, call: _Call) -> list[Update]:
        handles, *read = jax.device_get((call.handles, *self._readable(call.outputs)))
        outputs = self._reader.unpack(*read)
        start, now = max(call.dispatch_time, self._last_read_time), time.monotonic()  # of the call, near enough
        self._last_read_time = now
        self.stats.num_host_reads += 1
        if handles is not None:
            for sequence, row, generation in zip(call.submitted, handles.row_id, handles.generation, strict=False):
                self._by_row[int(row)] = sequence
                self._generation[row] = generation
        if self.observer is not None:
            self.observer(outputs, self._by_row, self._num_waiting_on_host())
        take_prompt_logprobs(outputs, self._by_row)
        touched = take_tokens(outputs, self._by_row)
        self._note_admissions(outputs, start)
        statuses, num_preemptions = outputs.status.tolist(), outputs.num_preemptions.tolist()
        for row, sequence in list(self._by_row.items()):
            status = Status(statuses[row])
            sequence.num_preemptions = num_preemptions[row]
            if status >= Status.STOP:
                del self._by_row[row]
                self._to_collect.append(row)
                sequence.finish(status)
            if sequence.finished and row not in touched and sequence.has_news:
                touched[row] = sequence
            group = sequence.group
            if group.finished and group.request.id in self._unfinished:
                self._finish(group)
        self.stats.count(outputs)
        return self._take_updates(touched.values(), now)

    def _note_admissions(self, outputs: StepOutputs, start: float) -> None:
        """Of requests that had a slot in a call that began at `start`, and none before."""
        waiting = [(row, sequence.group) for row, sequence in self._by_row.items() if not sequence.group.admitted]
        if not waiting:
            return
        in_slot: Any = outputs.steps.row_id[: int(outputs.num_steps)]
        in_slot = set(in_slot.ravel().tolist())
        for row, group in waiting:
            if row in in_slot and not group.admitted:  # by another sample
                group.admitted = True
                self.stats.latencies.queue.observe(start - group.arrival_time)

    def _take_updates(self, sequences: Iterable[LiveSample], now: float) -> list[Update]:
        updates = []
        for sequence in sequences:
            update = sequence.take_update()
            if update is not None:
                updates.append(update)
                self._observe(sequence, len(update.token_ids), now)
        return updates

    def _observe(self, sequence: LiveSample, num_tokens: int, now: float) -> None:
        latencies, group, last = self.stats.latencies, sequence.group, sequence.last_token_time
        if not num_tokens:
            return
        if last is not None:
            latencies.inter_token.observe((now - last) / num_tokens, num_tokens)
        else:
            if all(sample.last_token_time is None for sample in group.samples):
                latencies.time_to_first_token.observe(now - group.arrival_time)
            latencies.inter_token.observe(0.0, num_tokens - 1)
        sequence.last_token_time = now

    def _readable(self, outputs: PackedOutputs) -> tuple[jax.Array, PromptLogprobs | None]:
        """What the host has use for: the rest stays on the device."""
        wanted = any(group.params.prompt_logprobs is not None for group in self._unfinished.values())
        return outputs.packed, outputs.prompt if wanted else None

    def _finish(self, group: LiveRequest) -> None:
        del self._unfinished[group.request.id]
        self.stats.num_requests += 1
        self.stats.num_prompt_tokens += len(group.prompt_token_ids)
        self.stats.latencies.end_to_end.observe(time.monotonic() - group.arrival_time)

    def _num_waiting_on_host(self) -> int:
        """Samples that the device had not heard of in the call just read; some may be in the one in flight."""
        in_flight = sum(len(call.submitted) for call in self._calls)
        return in_flight + sum(len(group.samples) for _, _, group in self._waiting)

    def _count_waiting(self) -> None:
        """Those on the host, those in the call in flight, and those that had no slot at the end of the one before."""
        in_flight = sum(len(call.submitted) for call in self._calls)
        self.stats.num_waiting = len(self._waiting) + in_flight + len(self._by_row) - self.stats.num_running


class _Weights:
    """Parameters, in one object: those of two calls of `set_params` never mix."""

    def __init__(self, params: Params) -> None:
        leaves, self.structure = jax.tree.flatten(params)
        self.leaves = tuple(leaves)

    @property
    def params(self) -> Params:
        return jax.tree.unflatten(self.structure, self.leaves)


def _commit(params: Params) -> Params:
    """The same arrays, bound to where they are: what a program is compiled for must not change afterwards."""
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, params))


def _replicated(weights: _Weights) -> jax.sharding.Sharding:
    """Where the state starts: on the device of the weights, or on each device of their mesh."""
    sharding = weights.leaves[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
