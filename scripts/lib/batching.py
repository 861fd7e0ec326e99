"""Serves one workload batch by batch or all at once on engines that differ in memory, and tells what the slots did.

Static batching is the same engine fed a batch at a time: as many requests as there are slots run until the longest of them
ends, and only then are the next ones admitted. Reserving is the same engine with as many slots as fit when each has pages for
the longest sequence, as engines without paging hold them. So nothing else differs.
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
    """A way to serve."""

    name: str
    engine: Engine
    batch_size: int | None  # requests that the engine is given at a time; None: all
    reserved: bool = False  # whether a slot counts as holding pages for the longest sequence


@dataclasses.dataclass(frozen=True)
class Run:
    """One workload served once."""

    seconds: float
    timeline: Timeline
    queue_steps: list[int]  # per request, steps before the one in which it first had a slot
    queue_seconds: list[float]  # the same time; within a call of the device steps count as equally long
    token_ids: list[tuple[int, ...]]


class _Watch:
    """Keeps the record, and when each call was read; requests that the engine was not given yet, `num_held`, wait too."""

    def __init__(self, config: EngineConfig) -> None:
        self.timeline = Timeline(config)
        self.num_held = 0
        self.marks = [(0, 0.0)]  # steps so far, seconds
        self._start = time.perf_counter()

    def observe(self, outputs: StepOutputs, by_row: Mapping[int, LiveSample], num_waiting: int) -> None:
        self.timeline.observe(outputs, by_row, num_waiting + self.num_held)
        if self.timeline.num_steps > self.marks[-1][0]:
            self.marks.append((self.timeline.num_steps, time.perf_counter() - self._start))


def draw_outputs(distribution: str, low: int, high: int, count: int, rng: np.random.Generator) -> list[int]:
    """Output lengths: those of `draw_lengths`; fixed: all in the middle; textbook: 10, 20, 50, 100 as often, shuffled.

    Raises:
      ValueError: as `draw_lengths`.
    """
    if distribution == "textbook":
        return rng.permutation([TEXTBOOK[index % len(TEXTBOOK)] for index in range(count)]).tolist()
    if distribution == "fixed":
        low = high = (low + high) // 2
    return draw_lengths(distribution, low, high, count, rng)


def serve(contender: Contender, workload: Workload) -> Run:
    """Serves all requests, which are there from the beginning."""
    engine, params = contender.engine, workload.params
    size = contender.batch_size or len(workload)
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
    """By request, the step in which it first had a slot."""
    found, place = np.unique(timeline.steps().occupant.ravel(), return_index=True)
    pairs = zip(found.tolist(), (place // timeline.num_slots).tolist(), strict=True)
    return {timeline.occupants[index].request_id: step for index, step in pairs if index >= 0}


def compare(contenders: Sequence[Contender], workload: Workload, repeats: int) -> list[list[Run]]:
    """Runs of each contender; they take turns, and who goes first changes."""
    runs: list[list[Run]] = [[] for _ in contenders]
    for repeat in range(repeats):
        order = range(len(contenders))
        for index in order if repeat % 2 == 0 else reversed(order):
            runs[index].append(serve(contenders[index], workload))
    return runs


def ratios(runs: list[Run], base: list[Run]) -> dict[str, float]:
    """How much faster `runs` are than `base`: pair by pair in time, and exactly in steps."""
    pairs = zip(base, runs, strict=True)
    return {
        "speed_up": statistics.median(before.seconds / after.seconds for before, after in pairs),
        "steps_ratio": base[0].timeline.num_steps / runs[0].timeline.num_steps,
    }


def measures(contender: Contender, runs: list[Run], workload: Workload) -> dict[str, Any]:
    """What is known of a contender: medians of what was timed; what was counted is the same in every run."""
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
        **memory(steps, config, reserved=contender.reserved),
    }


def memory(steps: Steps, config: EngineConfig, *, reserved: bool) -> dict[str, Any]:
    """How many sequences ran at once, and which share of the pool's bytes held tokens, while any was waiting for a slot."""
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
    """What static batches cost an engine of fixed shapes, which pads prompts to the longest and runs full batches to the end.

    Rows are those of the forward pass; at least one per token of prompt and output, but for the last token, is needed.
    """
    slot_steps = rows = 0
    for first in range(0, len(workload), batch_size):
        batch = slice(first, first + batch_size)
        longest = max(workload.output_lengths[batch])
        slot_steps += batch_size * longest
        rows += batch_size * (max(map(len, workload.prompts[batch])) + longest - 1)
    needed = workload.num_prompt_tokens + workload.num_output_tokens - len(workload)
    return {"padded_slot_steps": slot_steps, "padded_rows": rows, "padded_rows_over_needed": rows / needed}
