"""The Engine for event loops and threads: a thread of its own steps it, and any thread may submit requests.

    any thread: check, tokenise --> incoming ---.
                                                 > engine thread: add, abort, step, deliver --> handles --> consumers
    any thread: abort ------------> aborts -----'

Only the engine thread touches the engine's queue and the device. It never waits for a consumer: it sleeps while there is
nothing to do, and updates that are not taken yet are merged. It wakes each event loop once per call of `Engine.step`,
however many requests have news there. `jaxserve.engine.loop` says what a call costs on the device.
"""

import asyncio
import atexit
import collections
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from jaxserve.engine.engine import Engine
from jaxserve.engine.live_requests import LiveRequest, Update
from jaxserve.engine.queue import QueueFullError
from jaxserve.engine.request_handle import EngineClosedError, Listener, RequestHandle
from jaxserve.engine.stats import EngineStats
from jaxserve.request import Request, RequestOutput, SamplingParams


class AsyncEngine:
    """Runs an `Engine` in a thread and serves tasks of event loops, and other threads.

    Every request ends with exactly one update that has a result, or with an error. If a call of the engine fails, its
    requests get `RequestFailedError` and the engine goes on with new ones. Until it is closed, only `set_params`,
    `reset_stats` and attributes of the engine may be used beside it.

    In an event loop it is an async context manager, elsewhere a plain one; leaving it closes it.

    Attributes:
      engine: the engine that runs.
    """

    def __init__(self, engine: Engine, *, steps_per_call: int | None = None) -> None:
        """Starts the thread. Programs are compiled with the first request, unless `engine.warm_up` was called.

        Args:
          engine: the engine to run; it must have no requests.
          steps_per_call: `max_steps` of each `Engine.step`. With fewer steps updates come sooner, at more calls per token.

        Raises:
          ValueError: if the engine has requests, or runs in another AsyncEngine, or `steps_per_call` is out of range.
        """
        self.engine = engine
        self._steps_per_call = engine.check_max_steps(steps_per_call)
        self._queue = engine.queue
        self._changed = threading.Condition()  # guards what follows
        self._handles: dict[str, RequestHandle] = {}  # handles of unfinished requests, by id
        self._incoming: collections.deque[LiveRequest] = collections.deque()
        self._aborts: list[RequestHandle] = []
        self._room: collections.deque[Callable[[], None]] = collections.deque()  # callbacks of waiting submitters
        self._closing = False
        self._reason = "this AsyncEngine is closed"
        self._cause: Exception | None = None  # the error that ended the thread
        self._stats = engine.stats.snapshot()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        engine.claim(self._thread)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left
            engine.release()
            raise
        atexit.register(self.close)  # a thread that is inside JAX when the interpreter ends would crash

    def submit(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        wait: bool = False,
    ) -> RequestHandle:
        """Adds a request from a plain thread.

        Args:
          prompt, params, id, priority: as in `Engine.add_request`.
          wait: when the queue is full, wait for room instead of raising.

        Raises:
          ValueError: if the request is not valid, or its id is that of an unfinished request.
          QueueFullError: if the engine's `max_waiting` requests wait already.
          EngineClosedError: if this AsyncEngine is closed, or closes during the wait.
        """
        self._check_open(wait)
        live = self._queue.accept(prompt, params, id, priority)
        handle, room = RequestHandle(live.id, self._abort), threading.Event()
        while not self._add(live, handle, room.set if wait else None):
            room.wait()
            room.clear()
        return handle

    async def stream(
        self,
        prompt: str | Sequence[int] | Request,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        wait: bool = False,
    ) -> AsyncGenerator[Update, None]:
        """Adds a request and yields what becomes of it: texts to be put together, and in the last update the result.

        Closing the generator, or cancelling the task that waits in it, aborts the request. Arguments are those of `submit`.

        Raises:
          ValueError, QueueFullError, EngineClosedError: as for `submit`, when the first update is asked for.
          RequestFailedError: if the request was lost.
        """
        self._check_open(wait)
        live = await asyncio.to_thread(self._queue.accept, prompt, params, id, priority)
        handle = await self._start(live, wait)
        try:
            while True:
                update = await handle.next_update()
                yield update
                if update.output is not None:
                    return
        finally:
            handle.abort()

    async def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Returns results for prompts, in their order, like `Engine.generate`; waits for room when the queue is full.

        Cancelling the task aborts what is unfinished.

        Raises:
          ValueError: before any is added, if a prompt or its parameters are not valid.
          EngineClosedError, RequestFailedError: as for `stream`; the other prompts are aborted.
        """
        requests = await asyncio.to_thread(self._queue.accept_all, prompts, params, priorities)
        handles: list[RequestHandle] = []
        try:
            for live in requests:
                handles.append(await self._start(live, wait=True))
            return [await handle.async_result() for handle in handles]
        finally:
            for handle in handles:
                handle.abort()

    def abort(self, request_id: str) -> None:
        """Ends a request with reason "abort" and the tokens generated so far. Finished and unknown ids have no effect.

        May be called in any thread.
        """
        with self._changed:
            handle = self._handles.get(request_id)
        if handle is not None:
            handle.abort()

    def stats(self) -> EngineStats:
        """Returns the totals, load and latencies at the end of the last step, in a record that does not change."""
        return self._stats

    def close(self) -> None:
        """Aborts all unfinished requests, waits until they have ended, and ends the thread. The engine is free again.

        Blocks; in an event loop use `aclose`. May be called again, and in any thread.
        """
        self._begin_to_close()
        self._thread.join()

    async def aclose(self) -> None:
        """Closes this as `close` does, without blocking the event loop."""
        self._begin_to_close()
        await asyncio.shield(asyncio.wrap_future(self._ended))
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _begin_to_close(self) -> None:
        atexit.unregister(self.close)
        with self._changed:
            if not self._closing:
                self._closing = True
                self._aborts += self._handles.values()
            self._changed.notify()

    def _check_open(self, wait: bool) -> None:
        """Refuses a request that cannot be taken now, before its prompt is tokenised; `_add` checks again."""
        with self._changed:
            self._raise_if_closing()
            if not wait:
                self._queue.check_room(len(self._incoming))

    def _raise_if_closing(self) -> None:
        if self._closing:
            raise EngineClosedError(f"{self._reason}: make another one") from self._cause

    async def _start(self, live: LiveRequest, wait: bool) -> RequestHandle:
        listener = Listener()
        handle = RequestHandle(live.id, self._abort, listener)
        while not self._add(live, handle, listener.notify if wait else None):
            await listener.event.wait()
            listener.event.clear()
        return handle

    def _add(self, live: LiveRequest, handle: RequestHandle, notify: Callable[[], None] | None) -> bool:
        """Hands a request to the engine thread. If the queue is full: raises, or returns False and calls `notify` later."""
        with self._changed:
            self._raise_if_closing()
            if handle.id in self._handles:
                raise ValueError(f"request id {handle.id!r} is in use by an unfinished request: ids must differ")
            try:
                self._queue.check_room(len(self._incoming))
            except QueueFullError:
                if notify is None:
                    raise
                self._room.append(notify)
                return False
            self._handles[handle.id] = handle
            self._incoming.append(live)
            self._changed.notify()
            return True

    def _abort(self, handle: RequestHandle) -> None:
        with self._changed:
            self._aborts.append(handle)
            self._changed.notify()

    # What follows runs in the engine thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # not one of a call, which `_turn` handles
            self._cause, self._reason = error, f"this AsyncEngine has ended with {type(error).__name__}: {error}"
        finally:
            self._end()

    def _turn(self) -> bool:
        """Does the work that is due, after a sleep if there is none. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            self._take_orders()
            if self._closing and not self.engine.has_work:
                return False
        if self.engine.has_work:
            try:
                updates = self.engine.step(self._steps_per_call)
            except Exception as error:
                self._fail(error)
                if self.engine.has_work:  # the engine has not recovered
                    raise
                updates = []
            self._stats = self.engine.stats.snapshot()
            self._deliver(updates)
        return True

    def _has_work(self) -> bool:
        has_room_for_waiters = self._room and self._queue.num_free_places(len(self._incoming)) > 0
        return bool(self._incoming or self._aborts or self._closing or self.engine.has_work or has_room_for_waiters)

    def _take_orders(self) -> None:
        while self._incoming:
            self._queue.add(self._incoming.popleft())
        for handle in self._aborts:
            if self._handles.get(handle.id) is handle:  # else it has finished, and another request may have its id
                self._queue.abort(handle.id)
        self._aborts.clear()
        for _ in range(min(len(self._room), self._queue.num_free_places())):
            self._room.popleft()()

    def _deliver(self, updates: Iterable[Update]) -> None:
        handles_by_loop: dict[asyncio.AbstractEventLoop, list[RequestHandle]] = {}
        with self._changed:
            for update in updates:
                handle = self._handles[update.request_id]
                if update.output is not None:
                    del self._handles[handle.id]
                handle.put(update)
                if handle.listener is not None:
                    handles_by_loop.setdefault(handle.listener.loop, []).append(handle)
        for loop, handles in handles_by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, handles)
            except RuntimeError:  # the loop is closed, so no task listens any more
                for handle in handles:
                    handle.abort()

    def _fail(self, error: Exception) -> None:
        """Fails the requests that the engine has lost. Requests that are not in the engine yet go on."""
        with self._changed:
            not_lost = {live.id for live in self._incoming}
            lost = [handle for name, handle in self._handles.items() if name not in not_lost]
            self._handles = {name: handle for name, handle in self._handles.items() if name in not_lost}
        for handle in lost:
            handle.fail(error)

    def _end(self) -> None:
        self.engine.release()
        with self._changed:
            self._closing = True
            self._incoming.clear()
            waiting, self._room = self._room, collections.deque()
        error = EngineClosedError(self._reason)
        error.__cause__ = self._cause
        self._fail(error)
        for notify in waiting:
            notify()
        self._ended.set_result(None)


def _wake(handles: Iterable[RequestHandle]) -> None:
    for handle in handles:
        if handle.listener is not None:
            handle.listener.event.set()
