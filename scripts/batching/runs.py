"""Serves a workload with static or continuous batching, on reserved or paged memory, and counts the work of the slots.

All contenders are the same engine, so nothing but the batching and the memory differs. With static batching it gets one batch
at a time: as many requests as there are slots run until the longest of them ends, and only then are the next ones admitted.
With reserved memory it has as many slots as fit when each holds pages for the longest sequence, like engines without paging.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lib.roofline import computed_before
from lib.workloads import LENGTHS, Workload, draw_lengths

from jaxserve import Engine, EngineConfig
from jaxserve.core.step import StepOutputs
from jaxserve.engine.live_requests import LiveSample
from jaxserve.timeline.record import Steps, Timeline

TEXTBOOK = (10, 20, 50, 100)
DISTRIBUTIONS = (*LENGTHS, "textbook", "workload")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to serve.

    Attributes:
      name: its name in tables and records.
      engine: the engine that serves.
      num_together: requests that the engine gets at a time; None: all at once.
      reserved: True if a slot counts as holding pages for the longest sequence.
    """

    name: str
    engine: Engine
    num_together: int | None
    reserved: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of serving a workload once.

    Attributes:
      seconds: from the first request to the last token.
      timeline: what each slot did in each step.
      queue_steps: per request, the steps before the one in which it first had a slot.
      queue_seconds: the same wait in seconds; the steps of one call count as equally long.
      token_ids: generated tokens of each request.
    """

    seconds: float
    timeline: Timeline
    queue_steps: list[int]
    queue_seconds: list[float]
    token_ids: list[tuple[int, ...]]


class _Watch:
    """An engine's observer that keeps the timeline and the time at which each call was read.

    Requests that the engine did not get yet, `num_held`, count as waiting.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.timeline = Timeline(config)
        self.num_held = 0
        self.marks = [(0, 0.0)]  # steps so far, seconds
        self._start = time.perf_counter()

    def observe(self, outputs: StepOutputs, samples_by_row: Mapping[int, LiveSample], num_waiting: int) -> None:
        self.timeline.observe(outputs, samples_by_row, num_waiting + self.num_held)
        if self.timeline.num_steps > self.marks[-1][0]:
            self.marks.append((self.timeline.num_steps, time.perf_counter() - self._start))


def draw_outputs(distribution: str, low: int, high: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draws output lengths as `draw_lengths` does, except for two distributions.

        fixed       all lengths are the middle of the bounds
        textbook    10, 20, 50 and 100 equally often, shuffled; the bounds have no effect

    Raises:
      ValueError: if the distribution is unknown, or the bounds are out of order.
    """
    if distribution == "textbook":
        return rng.permutation([TEXTBOOK[index % len(TEXTBOOK)] for index in range(count)]).tolist()
    if distribution == "fixed":
        low = high = (low + high) // 2
    return draw_lengths(distribution, low, high, count, rng)


def serve(contender: Contender, workload: Workload) -> Run:
    """Serves all requests of the workload; all of them wait from the beginning."""
    engine, params = contender.engine, workload.params
    size = contender.num_together or len(workload)
    results = []
    watch = _Watch(engine.config)
    engine.observer = watch.observe
    start = time.perf_counter()
    try:
        for first in range(0, len(workload), size):
            batch = slice(first, first + size)
            watch.num_held = max(len(workload) - batch.stop, 0)
            results += engine.generate(workload.prompts[batch], params[batch])
    finally:
        engine.observer = None
    seconds = time.perf_counter() - start
    first_steps = _first_steps(watch.timeline)
    queue_steps = [first_steps[result.request_id] for result in results]
    queue_seconds = np.interp(queue_steps, *np.asarray(watch.marks).T).tolist()
    token_ids = [result.outputs[0].token_ids for result in results]
    return Run(seconds, watch.timeline, queue_steps, queue_seconds, token_ids)


def _first_steps(timeline: Timeline) -> dict[str, int]:
    """Returns the step in which each request first had a slot, by request id."""
    occupants, first_places = np.unique(timeline.steps().occupant.ravel(), return_index=True)
    pairs = zip(occupants.tolist(), (first_places // timeline.num_slots).tolist(), strict=True)
    return {timeline.occupants[index].request_id: step for index, step in pairs if index >= 0}


def compare(contenders: Sequence[Contender], workload: Workload, repeats: int) -> list[list[Run]]:
    """Serves the workload `repeats` times with each contender, in turns whose order alternates, and returns their runs."""
    runs: list[list[Run]] = [[] for _ in contenders]
    for repeat in range(repeats):
        order = range(len(contenders))
        for index in order if repeat % 2 == 0 else reversed(order):
            runs[index].append(serve(contenders[index], workload))
    return runs


def ratios(runs: list[Run], base: list[Run]) -> dict[str, float]:
    """Returns how much faster `runs` are than `base`: in time as the median over pairs of runs, and exactly in steps."""
    pairs = zip(base, runs, strict=True)
    return {
        "speed_up": statistics.median(before.seconds / after.seconds for before, after in pairs),
        "steps_ratio": base[0].timeline.num_steps / runs[0].timeline.num_steps,
    }


def measures(contender: Contender, runs: list[Run], workload: Workload) -> dict[str, Any]:
    """Returns the figures of a contender: medians of times, and counts, which are the same in every run."""
    run, config = runs[0], contender.engine.config
    steps = run.timeline.steps()
    in_use = steps.occupant >= 0
    seconds = statistics.median(one.seconds for one in runs)
    queue = [[float(np.mean(one.queue_seconds)), float(np.quantile(one.queue_seconds, 0.99))] for one in runs]
    mean_seconds, p99_seconds = np.median(queue, axis=0).tolist()
    return {
        "slots": config.max_slots,
        "num_pages": config.num_pages,
        "page_size": config.page_size,
        "max_model_len": config.max_sequence_len,
        "seconds": seconds,
        "tokens_per_s": workload.num_output_tokens / seconds,
        "requests_per_s": len(workload) / seconds,
        "steps": len(steps),
        "mean_occupancy": steps.mean_occupancy,
        "slot_steps": in_use.size,
        "wasted_slot_steps": int(np.sum(~in_use)),
        "queue_s_mean": mean_seconds,
        "queue_s_p99": p99_seconds,
        "queue_steps_mean": float(np.mean(run.queue_steps)),
        "queue_steps_p99": float(np.quantile(run.queue_steps, 0.99)),
        "computed_tokens": int(np.sum(steps.num_new)),
        "preemptions": int(np.sum(steps.num_preempted)),
        **memory_use(steps, config, reserved=contender.reserved),
    }


def memory_use(steps: Steps, config: EngineConfig, *, reserved: bool) -> dict[str, Any]:
    """Returns how many sequences ran at once, and which share of the pool's bytes held tokens, while any request waited.

    If none ever waited, all steps count.
    """
    in_use = steps.occupant >= 0
    busy = steps.num_waiting > 0
    if not busy.any():
        busy[:] = True
    num_pages = config.num_pages or 0
    live = np.sum((computed_before(steps) + steps.num_new) * in_use, axis=1)[busy]
    running = np.sum(in_use, axis=1)[busy]
    pages = running * config.pages_per_slot if reserved else num_pages - steps.num_free_pages[busy]
    return {
        "busy_steps": int(np.sum(busy)),
        "in_flight_mean": float(np.mean(running)),
        "in_flight_peak": int(np.max(running)),
        "live_share_of_pool": float(np.mean(live)) / (num_pages * config.page_size),
        "live_share_of_held": float(np.sum(live) / max(np.sum(pages) * config.page_size, 1)),
    }


def padding(workload: Workload, batch_size: int) -> dict[str, Any]:
    """Returns the cost of static batches on an engine of fixed shapes, which pads prompts to the longest and runs full batches.

    Rows are those of the forward pass. Each token of prompts and outputs but the last one of a sequence needs a row.
    """
    slot_steps = rows = 0
    for first in range(0, len(workload), batch_size):
        batch = slice(first, first + batch_size)
        longest = max(workload.output_lengths[batch])
        slot_steps += batch_size * longest
        rows += batch_size * (max(map(len, workload.prompts[batch])) + longest - 1)
    needed = workload.num_prompt_tokens + workload.num_output_tokens - len(workload)
    return {"padded_slot_steps": slot_steps, "padded_rows": rows, "padded_rows_over_needed": rows / needed}
