"""Records of an engine's running totals, its load, and how long requests take."""

import bisect
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from jaxserve.core.scheduler.state import Status

if TYPE_CHECKING:
    from jaxserve.core.step import StepOutputs

# Seconds: five to each factor of ten, from 0.1 ms to 1000 s.
BUCKETS = tuple(float(f"{10 ** (exponent / 5):.3g}") for exponent in range(-20, 16))


@dataclasses.dataclass
class Histogram:
    """Durations counted in the buckets `BUCKETS`, whose upper bounds are inclusive as in Prometheus."""

    counts: list[int] = dataclasses.field(
        default_factory=lambda: [0] * (len(BUCKETS) + 1)
    )  # the last: above all bounds
    count: int = 0
    sum: float = 0.0  # seconds

    def observe(self, seconds: float, times: int = 1) -> None:
        """Counts a duration `times` times."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += times
        self.count += times
        self.sum += seconds * times

    @property
    def mean(self) -> float:
        """The mean duration in seconds; NaN if nothing was observed."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, q: float) -> float:
        """Returns an estimate of the `q` quantile of the durations in seconds; NaN if nothing was observed.

        The bucket is exact, and the place in it comes from linear interpolation. Above the last bound the result is that bound.

        Raises:
          ValueError: if `q` is not in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} must lie in [0, 1]: 0.5 is the median")
        if not self.count:
            return math.nan
        rank, below = q * self.count, 0
        for index, number in enumerate(self.counts[:-1]):
            if number and below + number >= rank:
                low = BUCKETS[index - 1] if index else 0.0
                return low + (BUCKETS[index] - low) * max(rank - below, 0.0) / number
            below += number
        return BUCKETS[-1]

    def copy(self) -> Self:
        """Returns an independent copy."""
        return dataclasses.replace(self, counts=list(self.counts))


@dataclasses.dataclass
class Latencies:
    """How long requests take, as the host sees it: each time is when the host read the output of a call."""

    queue: Histogram = dataclasses.field(default_factory=Histogram)  # from arrival to the start of the admitting call
    time_to_first_token: Histogram = dataclasses.field(default_factory=Histogram)  # from arrival
    # Between tokens of a sample. The tokens of one call share the time since the last token evenly; tokens that come with the
    # first one count as 0. So the sum for a sample is the time from its first token to its last.
    inter_token: Histogram = dataclasses.field(default_factory=Histogram)
    end_to_end: Histogram = dataclasses.field(default_factory=Histogram)  # from arrival to the end of all samples

    def copy(self) -> Self:
        """Returns an independent copy."""
        return type(self)(*(getattr(self, field.name).copy() for field in dataclasses.fields(self)))


@dataclasses.dataclass
class EngineStats:
    """Totals since the engine was made, or since `reset_stats`, and the load as of the last call that was read."""

    max_slots: int
    num_pages: int
    num_requests: int = 0  # finished requests
    num_prompt_tokens: int = 0  # tokens in the prompts of finished requests
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_slot_steps: int = 0  # slots in use, summed over steps
    num_computed_tokens: int = 0  # batch rows of the forward pass, recomputation included
    num_preemptions: int = 0
    num_device_calls: int = 0  # calls of compiled programs
    num_host_reads: int = 0  # times the host waited for the device: once per call of `run_steps`
    peak_pages: int = 0  # most pages in use at once
    compile_seconds: float = 0.0  # time of `warm_up`, which calls every program for the first time
    busy_seconds: float = 0.0  # time spent in `Engine.step`
    num_running: int = 0  # load: samples in slots
    num_waiting: int = 0  # load: requests in the host's queue, and samples in queue rows without a slot
    num_used_pages: int = 0  # load
    latencies: Latencies = dataclasses.field(default_factory=Latencies)

    def count(self, outputs: "StepOutputs") -> None:
        """Adds the outputs of a call of `run_steps`, as arrays of the host."""
        done: Any = outputs
        steps, num_steps = done.steps, int(done.num_steps)
        self.num_steps += num_steps
        self.num_slot_steps += int(np.sum(steps.row_id[:num_steps] < len(done.status)))
        self.num_computed_tokens += int(np.sum(steps.num_new[:num_steps]))
        self.num_generated_tokens += int(np.sum(steps.sampled[:num_steps]))
        self.num_preemptions += int(np.sum(steps.num_preempted[:num_steps]))
        if num_steps:
            used = self.num_pages - int(np.min(steps.num_free_pages[:num_steps]))
            self.peak_pages = max(self.peak_pages, used)
        self.num_running = int(np.sum(done.status == Status.RUNNING))
        self.num_used_pages = self.num_pages - int(done.num_free_pages)

    def snapshot(self) -> Self:
        """Returns a copy that does not change; `dataclasses.asdict` turns it into plain numbers."""
        return dataclasses.replace(self, latencies=self.latencies.copy())

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second spent in `Engine.step`."""
        return self.num_generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def mean_occupancy(self) -> float:
        """The share of the slots that are in use, averaged over steps."""
        return self.num_slot_steps / (self.num_steps * self.max_slots) if self.num_steps else 0.0

    def summary(self) -> str:
        """Returns the totals as one line of text."""
        return (
            f"{self.num_requests} requests, {self.num_prompt_tokens} prompt + {self.num_generated_tokens} generated "
            f"tokens, {self.tokens_per_second:.1f} tokens/s, mean slot occupancy {self.mean_occupancy:.0%} of "
            f"{self.max_slots}, peak page use {self.peak_pages}/{self.num_pages}, {self.num_preemptions} preemptions, "
            f"{self.num_steps} steps, compiled in {self.compile_seconds:.1f} s"
        )
