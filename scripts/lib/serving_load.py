"""Offers an open load to an engine: requests arrive when they are due, however far behind the engine is.

All times count from when a request was due, not from when the engine got it: the engine can get no request while one of its
calls runs, but users do not stop arriving then (leaving that out is called coordinated omission). Requests and engine share a
thread, so the load costs the engine nothing but `add_request`. A token's time is when the host has read the call that brought
it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lib.records import Record, rounded, spread

from jaxserve import QueueFullError, SamplingParams

SLOS = ("ttft_ms", "tpot_ms", "e2e_ms")
_GROWTH = 0.05  # a queue that takes more than this share of the arrivals grows


@dataclasses.dataclass
class Served:
    """The course of one request; all times are seconds from the start of the load.

    Attributes:
      due: when it was due.
      handed_over: when the engine got it.
      refused: True if the engine's queue was full.
      token_times: when each of its tokens was read.
      finish: when it finished; None if it did not.
    """

    due: float
    handed_over: float = float("nan")
    refused: bool = False
    token_times: list[float] = dataclasses.field(default_factory=list)
    finish: float | None = None

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return 1e3 * (self.token_times[0] - self.due)

    @property
    def e2e_ms(self) -> float:
        """Time to the last token."""
        return 1e3 * (self.token_times[-1] - self.due)

    @property
    def tpot_ms(self) -> float | None:
        """Time per token after the first; None if there is only one."""
        count = len(self.token_times) - 1
        return 1e3 * (self.token_times[-1] - self.token_times[0]) / count if count else None

    @property
    def itl_ms(self) -> list[float]:
        """Times between two tokens; 0 between tokens of the same call."""
        return (1e3 * np.diff(self.token_times)).tolist()


@dataclasses.dataclass(frozen=True)
class Trace:
    """The course of a load.

    Attributes:
      served: the course of each request.
      waiting: (seconds, requests without a slot) after each call of the engine.
      num_steps: steps that the engine took.
      num_preemptions: sequences that lost their slot.
      occupancy: share of the slots in use, averaged over steps.
    """

    served: list[Served]
    waiting: list[tuple[float, int]]
    num_steps: int = 0
    num_preemptions: int = 0
    occupancy: float = 0.0


def arrival_times(rate: float, burstiness: float, count: int, rng: np.random.Generator) -> list[float]:
    """Draws the seconds at which requests are due: gamma-distributed gaps, stretched so that the last comes at count / rate.

    Args:
      rate: requests per second; infinity for all at once.
      burstiness: shape of the gamma distribution: 1 is a Poisson process, less is bursts, more is regular.
      count: number of requests.
      rng: source of randomness.
    """
    gaps = rng.gamma(burstiness, 1 / burstiness, count)
    times = np.cumsum(gaps)
    return (times / times[-1] * count / rate).tolist() if rate < float("inf") else [0.0] * count


def offer(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    due: Sequence[float],
    *,
    steps_per_call: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Trace:
    """Offers requests at the seconds in `due`, which ascend, and steps the engine until all are finished."""
    engine.reset_stats()
    served, waiting = [Served(at) for at in due], []
    start, upcoming = clock(), 0
    while upcoming < len(due) or engine.has_unfinished:
        now = clock() - start
        while upcoming < len(due) and due[upcoming] <= now:
            served[upcoming].handed_over = now
            try:
                engine.add_request(prompts[upcoming], params[upcoming], id=str(upcoming))
            except QueueFullError:
                served[upcoming].refused = True
            upcoming, now = upcoming + 1, clock() - start
        if not engine.has_unfinished:
            if upcoming < len(due):
                sleep(due[upcoming] - now)
            continue
        updates = engine.step(steps_per_call)
        now = clock() - start
        for update in updates:
            one = served[int(update.request_id)]
            one.token_times += [now] * len(update.token_ids)
            one.finish = now if update.output is not None else None
        waiting.append((now, engine.stats.num_waiting))
    stats = engine.stats.snapshot()
    while engine.has_work:  # a call may still be in flight
        engine.step(steps_per_call)
    return Trace(served, waiting, stats.num_steps, stats.num_preemptions, stats.mean_occupancy)


def parse_slos(text: str) -> dict[str, float]:
    """Reads bounds in milliseconds from a text such as "ttft_ms:500,tpot_ms:100".

    Raises:
      ValueError: if the text does not have this form.
    """
    bounds: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, number = part.partition(":")
        try:
            bound = float(number)
        except ValueError:
            bound = -1.0
        if name not in SLOS or not 0 < bound < float("inf"):
            raise ValueError(f"--slo: {part!r} must be one of {', '.join(SLOS)} and milliseconds, as in ttft_ms:500")
        if name in bounds:
            raise ValueError(f"--slo: {name} is there twice: give one bound")
        bounds[name] = bound
    return bounds


def queue_growth(trace: Trace, rate: float) -> float | None:
    """Returns the share of arriving requests that piles up, by a line through the last three quarters of the arrivals.

    0 means that the engine keeps up, 0.5 that it serves half of the requests that arrive; None means that there were too few
    calls to tell, or that all requests arrived at once.
    """
    last = max(one.due for one in trace.served)
    points = [(at, count) for at, count in trace.waiting if last / 4 <= at <= last]
    if len(points) < 3 or not 0 < rate < float("inf"):
        return None
    at, count = np.asarray(points).T
    at, weight = at - at.mean(), np.gradient(at)  # weights, as calls are not evenly spread
    at -= np.average(at, weights=weight)
    slope = np.average(at * count, weights=weight) / np.average(at * at, weights=weight)
    return float(slope) / rate


def is_above_capacity(trace: Trace, rate: float) -> bool | None:
    """Returns whether the queue grew as long as requests arrived; None if there is too little data to tell."""
    growth = queue_growth(trace, rate)
    if growth is None:
        return None
    last = max(one.due for one in trace.served)
    return growth > _GROWTH and growth * rate * last >= 2  # a single request that waits does not count


def summarize(trace: Trace, rate: float, slos: Mapping[str, float]) -> Record:
    """Returns the figures of a load; latencies are in milliseconds, over requests that were not refused."""
    done = [one for one in trace.served if one.finish is not None and one.token_times]
    seconds = max((one.token_times[-1] for one in done), default=float("nan"))
    good = sum(all((getattr(one, name) or 0) <= bound for name, bound in slos.items()) for one in done)
    growth = queue_growth(trace, rate)
    return {
        "seconds": rounded(seconds),
        "num_finished": len(done),
        "num_refused": sum(one.refused for one in trace.served),
        "requests_per_s": rounded(len(done) / seconds),
        "output_tokens_per_s": rounded(sum(len(one.token_times) for one in done) / seconds),
        "ttft_ms": spread([one.ttft_ms for one in done]),
        "tpot_ms": spread([one.tpot_ms for one in done if one.tpot_ms is not None]),
        "itl_ms": spread([gap for one in done for gap in one.itl_ms]),
        "e2e_ms": spread([one.e2e_ms for one in done]),
        "late_ms": spread([1e3 * (one.handed_over - one.due) for one in trace.served]),
        "goodput_requests_per_s": rounded(good / seconds) if slos else None,
        "share_within_slos": rounded(good / len(trace.served)) if slos else None,
        "most_waiting": max((count for _, count in trace.waiting), default=0),
        "queue_growth": None if growth is None else rounded(growth),
        "above_capacity": is_above_capacity(trace, rate),
        "steps": trace.num_steps,
        "mean_occupancy": rounded(trace.occupancy),
        "preemptions": trace.num_preemptions,
    }
