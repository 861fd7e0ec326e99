"""The requests of an engine: those that wait on the host, and all that are unfinished. Engine and AsyncEngine share it.

    accept (any thread) ---> add ---> waiting ---> pop ---> on the device ---> remove
                                         `--- abort ---> pop_aborted ---> remove

The work per call depends on how many requests move: nothing here goes through all requests that wait or are unfinished.
"""

import heapq
from collections.abc import Sequence

from jaxserve.core.make_submission import one_per_prompt
from jaxserve.engine.intake import Intake
from jaxserve.engine.live_requests import LiveRequest, LiveSample
from jaxserve.request import MAX_INT32, Request, SamplingParams

_Entry = tuple[int, int, LiveRequest]  # priority, running number, request


class QueueFullError(RuntimeError):
    """A request was refused because `max_waiting` requests wait already."""


class RequestQueue:
    """Requests from the moment they are added until they have ended.

    Any thread may call `accept`, `accept_all`, `check_room` and `abort`; only the one that steps the engine may call the rest.

    Attributes:
      intake: checks and tokenises requests.
      max_waiting: most waiting requests before `check_room` refuses one more; None: no bound.
      unfinished: all requests that have not ended, by id.
      num_waiting_samples: samples of the requests that wait.
    """

    def __init__(self, intake: Intake, max_waiting: int | None) -> None:
        self.intake = intake
        self.max_waiting = max_waiting
        self._num_added = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all requests."""
        self.unfinished: dict[str, LiveRequest] = {}
        self.num_waiting_samples = 0
        self._waiting: dict[str, _Entry] = {}  # by id
        self._heap: list[_Entry] = []  # entries of `_waiting`, and stale ones of requests that were aborted
        self._aborted: list[LiveRequest] = []  # since the last `pop_aborted`
        self._with_prompt_logprobs: set[str] = set()  # ids of unfinished requests on the device

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether an unfinished request that has left the queue asks for log probabilities of its prompt."""
        return bool(self._with_prompt_logprobs)

    def accept(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        id: str | None = None,
        priority: int = 0,
    ) -> LiveRequest:
        """Checks and tokenises a request, in any thread, without adding it. Takes the arguments of `Intake.accept`."""
        return self.intake.accept(prompt, params, id, priority, in_use=self.unfinished)

    def accept_all(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        priorities: Sequence[int] | None = None,
    ) -> list[LiveRequest]:
        """Checks and tokenises requests, in any thread, without adding them.

        Args:
          prompts: texts, or lists of token ids; a single text is one prompt.
          params: parameters for all prompts, or one per prompt; None: the defaults.
          priorities: one per prompt; None: all 0.

        Raises:
          ValueError: if a prompt or its parameters are not valid; the message has the prompt's index.
        """
        each = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = []
        for index, (prompt, (own, priority)) in enumerate(
            zip(each, one_per_prompt(len(each), params, priorities), strict=True)
        ):
            try:
                requests.append(self.accept(prompt, own, None, priority))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return requests

    def num_free_places(self, num_coming: int = 0) -> int:
        """Returns how many requests may still be added after `num_coming` more."""
        return MAX_INT32 if self.max_waiting is None else self.max_waiting - num_coming - self.num_waiting

    def check_room(self, num_coming: int = 0) -> None:
        """Refuses one more request if there is no place for it. The check is cheap, so make it before you tokenise the prompt.

        Args:
          num_coming: number of requests that were accepted but not added yet.

        Raises:
          QueueFullError: if at least `max_waiting` requests wait, counting `num_coming`.
        """
        if self.num_free_places(num_coming) <= 0:
            raise QueueFullError(
                f"{num_coming + self.num_waiting} requests wait, and no more than max_waiting={self.max_waiting} "
                "may: add this one again when some have been admitted, or raise max_waiting in EngineConfig"
            )

    def add(self, live: LiveRequest) -> None:
        """Adds an accepted request, even above `max_waiting`; callers that respect this bound call `check_room` first."""
        entry = live.request.priority, self._num_added, live
        self._num_added += 1
        self.unfinished[live.id] = live
        self._waiting[live.id] = entry
        self.num_waiting_samples += len(live.samples)
        heapq.heappush(self._heap, entry)

    def pop(self, max_samples: int) -> list[LiveSample]:
        """Removes the first waiting requests, by priority and arrival, and returns their samples, at most `max_samples`.

        No request overtakes another one: if the first does not fit, the list is empty.
        """
        samples: list[LiveSample] = []
        while (live := self._first()) is not None and len(samples) + len(live.samples) <= max_samples:
            heapq.heappop(self._heap)
            self._leave(live)
            samples += live.samples
            if live.params.prompt_logprobs is not None:
                self._with_prompt_logprobs.add(live.id)
        return samples

    def abort(self, request_id: str) -> None:
        """Marks a request, so that the next step ends it. Finished and unknown ids have no effect."""
        live = self.unfinished.get(request_id)
        if live is not None and not live.abort_requested:
            live.abort_requested = True
            self._aborted.append(live)

    def pop_aborted(self) -> list[LiveRequest]:
        """Removes and returns the requests that were aborted while they waited. The device ends those that it has."""
        if not self._aborted:
            return []
        marked, self._aborted = self._aborted, []
        aborted = [live for live in marked if self._is_waiting(live)]
        for live in aborted:
            self._leave(live)
        if len(self._heap) > 2 * len(self._waiting):  # rebuilt rarely enough that a stale entry has constant cost
            self._heap = list(self._waiting.values())
            heapq.heapify(self._heap)
        return aborted

    def is_unfinished(self, live: LiveRequest) -> bool:
        """Returns whether this very request has not ended; another one may have its id by now."""
        return self.unfinished.get(live.id) is live

    def remove(self, live: LiveRequest) -> None:
        """Removes a request that has ended."""
        del self.unfinished[live.id]
        self._with_prompt_logprobs.discard(live.id)

    def _is_waiting(self, live: LiveRequest) -> bool:
        entry = self._waiting.get(live.id)
        return entry is not None and entry[2] is live

    def _leave(self, live: LiveRequest) -> None:
        del self._waiting[live.id]
        self.num_waiting_samples -= len(live.samples)

    def _first(self) -> LiveRequest | None:
        """Returns the next request, or None; drops stale entries before it."""
        while self._heap:
            if self._is_waiting(live := self._heap[0][2]):
                return live
            heapq.heappop(self._heap)
        return None
