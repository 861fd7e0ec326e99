"""The stats of an engine: totals, load, and how long requests take. They are updated when a call is read."""

import time
from collections.abc import Iterable, Mapping

from jaxserve.config import EngineConfig
from jaxserve.core.step import StepOutputs
from jaxserve.engine.live_requests import LiveRequest, LiveSample, Update
from jaxserve.engine.stats import EngineStats


class Reporter:
    """Keeps the stats of an engine.

    Attributes:
      stats: the record; `reset` replaces it by a new one.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.stats = EngineStats(config.max_slots, config.num_pages or 0)
        self._last_read_time = 0.0

    def reset(self) -> None:
        """Sets totals and latencies to zero; the load stays."""
        old = self.stats
        self.stats = EngineStats(
            old.max_slots,
            old.num_pages,
            num_running=old.num_running,
            num_waiting=old.num_waiting,
            num_used_pages=old.num_used_pages,
        )

    def forget_load(self) -> None:
        """Sets the load to zero: nothing runs and nothing waits."""
        self.stats.num_running = self.stats.num_waiting = self.stats.num_used_pages = 0

    def note_read(self, dispatch_time: float) -> float:
        """Counts a read that has just returned, and returns about when the call began on the device.

        With one call in flight this is the later of the call's dispatch and the read of the call before it.
        """
        start, self._last_read_time = max(dispatch_time, self._last_read_time), time.monotonic()
        self.stats.num_host_reads += 1
        return start

    def note_admissions(self, outputs: StepOutputs, samples_by_row: Mapping[int, LiveSample], start: float) -> None:
        """Records how long requests waited that had their first slot in a call that began at `start`."""
        waiting = [(row, sample.live) for row, sample in samples_by_row.items() if not sample.live.admitted]
        if not waiting:
            return
        rows_in_slots = set(outputs.steps.row_id[: int(outputs.num_steps)].ravel().tolist())
        for row, live in waiting:
            if row in rows_in_slots and not live.admitted:  # another of its samples may have set it
                live.admitted = True
                self.stats.latencies.queue.observe(start - live.arrival_time)

    def note_end(self, live: LiveRequest) -> None:
        """Counts a request that has ended."""
        self.stats.num_requests += 1
        self.stats.num_prompt_tokens += len(live.prompt_token_ids)
        self.stats.latencies.end_to_end.observe(time.monotonic() - live.arrival_time)

    def take_updates(self, samples: Iterable[LiveSample]) -> list[Update]:
        """Returns the updates of samples that have news from the call just read, and records how long their tokens took."""
        updates = []
        for sample in samples:
            update = sample.take_update()
            if update is not None:
                updates.append(update)
                self.note_tokens(sample, len(update.token_ids), self._last_read_time)
        return updates

    def note_tokens(self, sample: LiveSample, num_tokens: int, now: float) -> None:
        """Records how long the tokens took that a sample got in a call read at `now`."""
        latencies, live, last = self.stats.latencies, sample.live, sample.last_token_time
        if not num_tokens:
            return
        if last is not None:
            latencies.inter_token.observe((now - last) / num_tokens, num_tokens)
        else:
            if all(other.last_token_time is None for other in live.samples):
                latencies.time_to_first_token.observe(now - live.arrival_time)
            latencies.inter_token.observe(0.0, num_tokens - 1)
        sample.last_token_time = now
