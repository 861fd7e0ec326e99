"""A request that an AsyncEngine serves, as its submitter holds it: its updates and its result, for threads and event loops."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Self

from jaxserve.engine.live_requests import Update
from jaxserve.request import RequestOutput


class EngineClosedError(RuntimeError):
    """The AsyncEngine was closed, or its thread has ended."""


class RequestFailedError(RuntimeError):
    """The engine failed while it served the request; `__cause__` says why. Other requests may be submitted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Listener:
    """A task that waits for updates: its event loop, and an event of that loop."""

    loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)
    event: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wakes the task, from another thread. Has no effect if its loop is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.event.set)


class RequestHandle:
    """A submitted request, for a plain thread: an iterator of its updates, and its result.

    The last update has the result. Updates of a sample that come faster than they are taken are merged into one.

    Attributes:
      id: the request's id.
      listener: the task that takes the updates; None: a thread does.
    """

    def __init__(
        self, request_id: str, abort: "Callable[[RequestHandle], None]", listener: Listener | None = None
    ) -> None:
        self.id = request_id
        self.listener = listener
        self._abort = abort
        self._changed = threading.Condition()
        self._pending: dict[int, list[Update]] = {}  # by sample; the one with the result comes last
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Update:
        """Waits for news and returns it.

        Raises:
          RequestFailedError, EngineClosedError: if the request was lost.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self.finished)
            update = self.take()
        if update is None:
            raise StopIteration
        return update

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._output is not None or self._error is not None

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the result and returns it. The updates before it need not be taken.

        Args:
          timeout: seconds to wait; None: there is no limit.

        Raises:
          TimeoutError: if the request has not finished in this time; it goes on.
          RequestFailedError, EngineClosedError: if the request was lost.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"request {self.id!r} has not finished within {timeout} s: wait longer, or abort it")
            self._raise_if_lost()
            assert self._output is not None
            return self._output

    def abort(self) -> None:
        """Ends the request with reason "abort" and the tokens generated so far. Has no effect if it has finished."""
        if not self.finished:
            self._abort(self)

    def put(self, update: Update) -> None:
        """Adds an update from the engine."""
        with self._changed:
            if update.output is not None:
                self._output = update.output
                self._pending[update.index] = self._pending.pop(update.index, [])
            self._pending.setdefault(update.index, []).append(update)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Ends the request without a result, and wakes the threads and tasks that wait for it."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
        if self.listener is not None:
            self.listener.notify()

    def take(self) -> Update | None:
        """Returns the pending update of one sample, without waiting; None if there is none.

        Raises:
          RequestFailedError, EngineClosedError: if the request was lost.
        """
        with self._changed:
            if self._pending:
                return _merged(self._pending.pop(next(iter(self._pending))))
            self._raise_if_lost()
            return None

    async def next_update(self) -> Update:
        """Waits for an update in the listener's task and returns it; raises the errors of `take`."""
        assert self.listener is not None
        while True:
            self.listener.event.clear()
            update = self.take()
            if update is not None:
                return update
            await self.listener.event.wait()

    async def async_result(self) -> RequestOutput:
        """Waits for the result in the listener's task and returns it; raises the errors of `take`."""
        while True:
            update = await self.next_update()
            if update.output is not None:
                return update.output

    def _raise_if_lost(self) -> None:
        error = self._error
        if isinstance(error, EngineClosedError):
            raise EngineClosedError(*error.args) from error.__cause__
        if error is not None:
            raise RequestFailedError(f"the engine failed while it served request {self.id!r}: {error}") from error


def _merged(updates: list[Update]) -> Update:
    """Merges several updates of one sample into one."""
    if len(updates) == 1:
        return updates[0]
    return dataclasses.replace(
        updates[-1],
        text="".join(update.text for update in updates),
        token_ids=tuple(token for update in updates for token in update.token_ids),
    )
