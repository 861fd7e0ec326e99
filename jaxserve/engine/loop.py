"""The loop of an engine: each turn dispatches one call and hands out the outputs of the call before it.

    queue ------- update ---------> queue rows --- run_steps ---> outputs ------> updates, results
    (host)  (collect, abort, submit)             (up to n steps)         (text, stop reasons)

One call is kept in flight: while the device works on a call, the host reads the output of the one before. A row that
finishes is collected with the next `update`, so Q, the queue rows, is a multiple of the slots: waiting rows fill the slots.

Per call of `Engine.step` the host dispatches one `run_steps`, before it one `update` if anything was submitted, collected or
aborted, and reads once, all outputs of the call before. With n steps per call (`max_steps_per_call`) and s decoding samples,
one generated token costs at most 2 / (n s) device calls and 1 / (n s) reads; `EngineStats` counts both. A call ends early when
a sample finishes and none waits for its slot; its cost per token is then higher.
"""

from jaxserve.core.scheduler import Status, check_invariants
from jaxserve.engine.driver import Call, Driver
from jaxserve.engine.live_requests import LiveRequest, Update
from jaxserve.engine.queue import RequestQueue
from jaxserve.engine.reporting import Reporter
from jaxserve.engine.transport import Observer, take_prompt_logprobs, take_tokens


class Loop:
    """Moves requests from the queue to the driver, and what comes back to the requests.

    Attributes:
      debug_checks: whether the state's invariants are checked after every call, each of one step.
    """

    def __init__(self, queue: RequestQueue, driver: Driver, reporter: Reporter, *, debug_checks: bool) -> None:
        self._queue, self._driver, self._reporter = queue, driver, reporter
        self.debug_checks = debug_checks

    def reset(self) -> None:
        """Forgets all requests, and everything on the device but the weights."""
        self._queue.clear()
        self._reporter.forget_load()
        self._driver.reset()

    def turn(self, limit: int, observer: Observer | None) -> list[Update]:
        """Dispatches a call of up to `limit` steps, and returns the updates that the call before it brought.

        Args:
          limit: most steps of the call.
          observer: a function that gets the outputs that were read; None: there is no observer.
        """
        updates = self._end_aborted()
        depth = 0  # calls in flight when this returns
        if self._queue.unfinished or self._driver.samples_by_row:
            submitted = self._queue.pop(self._driver.num_places)
            self._reporter.stats.num_device_calls += self._driver.dispatch(submitted, 1 if self.debug_checks else limit)
            depth = 0 if self.debug_checks else 1
        while len(self._driver.calls) > depth:
            updates += self._process(self._driver.calls.popleft(), observer)
        num_on_device = self._driver.num_in_flight + len(self._driver.samples_by_row)
        self._reporter.stats.num_waiting = self._queue.num_waiting + num_on_device - self._reporter.stats.num_running
        if self.debug_checks:
            check_invariants(self._driver.state)
        return updates

    def _end_aborted(self) -> list[Update]:
        """Ends aborted requests that were never submitted to the device."""
        aborted = self._queue.pop_aborted()
        for live in aborted:
            live.finish(Status.ABORT)
            self._end(live)
        updates = (sample.take_update() for live in aborted for sample in live.samples)
        return [update for update in updates if update is not None]

    def _process(self, call: Call, observer: Observer | None) -> list[Update]:
        """Reads a call, and hands its outputs to the samples."""
        outputs = self._driver.read(call, prompt_logprobs=self._queue.wants_prompt_logprobs)
        start = self._reporter.note_read(call.dispatch_time)
        samples = self._driver.samples_by_row
        if observer is not None:
            observer(outputs, samples, self._driver.num_in_flight + self._queue.num_waiting_samples)
        take_prompt_logprobs(outputs, samples)
        changed = take_tokens(outputs, samples)
        self._reporter.note_admissions(outputs, samples, start)
        on_device = list(samples.items())
        self._driver.end_rows(outputs)
        for row, sample in on_device:
            if sample.finished and row not in changed and sample.has_news:
                changed[row] = sample
            if sample.live.finished and self._queue.is_unfinished(sample.live):
                self._end(sample.live)
        self._reporter.stats.count(outputs)
        return self._reporter.take_updates(changed.values())

    def _end(self, live: LiveRequest) -> None:
        self._queue.remove(live)
        self._reporter.note_end(live)
