"""What the slots of an engine did, step by step: kept as it comes from the device, and made a picture of.

    timeline = Timeline(engine.config)
    engine.observer = timeline.observe
    engine.generate(prompts)
    timeline.save("timeline.html")

Slots go down, steps across; each sequence is a bar in its slot, coloured by phase. Below are the pages in use and the queue.
"""

import contextlib
import dataclasses
import enum
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxserve.config import EngineConfig
from jaxserve.core.scheduler import Status
from jaxserve.core.step import StepOutputs
from jaxserve.engine.engine import Engine
from jaxserve.engine.live_requests import LiveSample

FORMATS = (".png", ".html")


class Phase(enum.IntEnum):
    """What a sequence does in a step."""

    PREFILL = 0
    RECOMPUTE = 1  # prefill once more, after it was preempted
    DECODE = 2  # one token had no key and value yet, and the next was drawn
    STALLED = 3  # it has a slot, but other prompts had all rows of the step's chunk
    PREEMPTED = 4  # it has no slot; shown where it had one, until another sequence takes that


@dataclasses.dataclass
class Occupant:
    """A sequence that had a slot at some time."""

    request_id: str
    sample: int | None  # its index; None: the request's only one
    prompt_length: int  # tokens
    finish_reason: str | None = None  # None: not finished
    end_call: int | None = None  # first step of the call that told of its end

    @property
    def name(self) -> str:
        """As results have it."""
        return self.request_id if self.sample is None else f"{self.request_id}[{self.sample}]"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What happened in each step."""

    occupant: Int32[np.ndarray, "n S"]  # index of the sequence in each slot; -1: none
    num_new: Int32[np.ndarray, "n S"]  # tokens whose keys and values were computed
    sampled: Bool[np.ndarray, "n S"]  # whether a token was drawn
    num_free_pages: Int32[np.ndarray, " n"]
    num_waiting: Int32[np.ndarray, " n"]  # samples on device and host without a slot
    num_preempted: Int32[np.ndarray, " n"]  # sequences that lost their slot in this step

    def __len__(self) -> int:
        return len(self.occupant)

    @property
    def mean_occupancy(self) -> float:
        """Share of the slots in use, averaged over steps."""
        return float(np.mean(self.occupant >= 0)) if self.occupant.size else 0.0


@dataclasses.dataclass(frozen=True)
class Gap:
    """Steps in which a sequence had to do without a slot, from the one that preempted it on."""

    occupant: int
    slot: int  # that it had
    start: int
    stop: int  # first step in which it had a slot again, or was no more


@dataclasses.dataclass(frozen=True)
class Bar:
    """Steps in a row in which the same sequence was in the same phase in the same slot."""

    slot: int
    start: int
    stop: int
    occupant: int
    phase: Phase
    num_tokens: int  # drawn in them if the phase is DECODE, else computed
    odd: bool  # of each slot's sequences every other one, to tell neighbours apart


class Timeline:
    """The record of an engine's steps.

    Attributes:
      num_slots, num_pages: of the engine.
      num_steps: so far.
      occupants: sequences in the order in which they first had a slot.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Nothing has happened yet; `config` is the engine's, with all capacities chosen."""
        self.num_slots = config.max_slots
        self.num_pages = config.num_pages or 0
        self.occupants: list[Occupant] = []
        self._index: dict[tuple[int, int, str, int], int] = {}  # row, generation, request id, sample -> occupant
        none, slots = np.zeros(0, np.int32), np.zeros((0, config.max_slots), np.int32)
        self._calls = [Steps(slots, slots, slots.astype(bool), none, none, none)]
        self.num_steps = 0

    def observe(self, outputs: StepOutputs, by_row: Mapping[int, LiveSample], num_waiting: int) -> None:
        """Takes what a call did; an engine's `observer`."""
        done: Any = outputs
        steps, num_steps = done.steps, int(done.num_steps)
        row_id = steps.row_id[:num_steps]
        in_slot = np.bincount(row_id.ravel(), minlength=len(done.status) + 1) > 0
        index = np.full(len(done.status) + 1, -1, np.int32)
        for row, sequence in by_row.items():
            if in_slot[row]:
                index[row] = self._index_of(row, int(done.generation[row]), sequence)
            if done.status[row] >= Status.STOP:
                self._end(row, int(done.generation[row]), sequence, Status(int(done.status[row])))
        self._calls.append(
            Steps(
                occupant=index[row_id],
                num_new=steps.num_new[:num_steps].copy(),
                sampled=steps.sampled[:num_steps].copy(),
                num_free_pages=steps.num_free_pages[:num_steps].copy(),
                num_waiting=steps.num_waiting[:num_steps] + np.int32(num_waiting),
                num_preempted=steps.num_preempted[:num_steps].copy(),
            )
        )
        self.num_steps += num_steps

    def _index_of(self, row: int, generation: int, sequence: LiveSample) -> int:
        group = sequence.group
        key = (row, generation, group.request.id, sequence.index)
        if key not in self._index:
            self._index[key] = len(self.occupants)
            sample = sequence.index if len(group.samples) > 1 else None
            self.occupants.append(Occupant(group.request.id, sample, len(group.prompt_token_ids)))
        return self._index[key]

    def _end(self, row: int, generation: int, sequence: LiveSample, status: Status) -> None:
        index = self._index.get((row, generation, sequence.group.request.id, sequence.index))
        if index is None:
            return  # aborted before it had a slot
        if sequence.finished:  # the host ended it, with a stop string
            status = sequence.status
        self.occupants[index].finish_reason = status.finish_reason
        self.occupants[index].end_call = self.num_steps

    def steps(self) -> Steps:
        """All steps so far."""
        names = [field.name for field in dataclasses.fields(Steps)]
        return Steps(**{name: np.concatenate([getattr(call, name) for call in self._calls]) for name in names})

    def gaps(self, steps: Steps) -> list[Gap]:
        """When sequences had lost their slots."""
        step, slot = np.nonzero(steps.occupant >= 0)
        occupant = steps.occupant[step, slot]
        order = np.lexsort((step, occupant))
        seen = np.stack([occupant[order], slot[order], step[order]], axis=1).tolist()
        gaps = []
        for (index, place, last), after in itertools.zip_longest(seen, seen[1:]):
            if after is not None and after[0] == index:
                stop = after[2]
            else:
                end_call = self.occupants[index].end_call
                stop = len(steps) if end_call is None else max(end_call, last + 1)
            if stop > last + 1:
                gaps.append(Gap(index, place, last + 1, stop))
        return gaps

    def phases(self, steps: Steps, gaps: list[Gap]) -> Int32[np.ndarray, "n S"]:
        """The phase of the sequence in each slot; meaningless where there is none."""
        resumed = np.full(len(self.occupants) + 1, len(steps))  # first step after a gap; the last entry: no sequence
        for gap in gaps:
            resumed[gap.occupant] = min(resumed[gap.occupant], gap.stop)
        again = np.arange(len(steps))[:, None] >= resumed[steps.occupant]
        working = np.where(again, Phase.RECOMPUTE, Phase.PREFILL)
        working = np.where(steps.sampled & (steps.num_new == 1), Phase.DECODE, working)
        return np.where(steps.num_new > 0, working, Phase.STALLED).astype(np.int32)

    def bars(self) -> list[Bar]:
        """What there is to draw, slot by slot: runs of steps that are alike are one bar, and nothing is left out."""
        steps = self.steps()
        gaps = self.gaps(steps)
        occupant, phase = steps.occupant.copy(), self.phases(steps, gaps)
        for gap in gaps:
            taken = np.flatnonzero(steps.occupant[gap.start : gap.stop, gap.slot] >= 0)
            shown = slice(gap.start, gap.start + int(taken[0]) if len(taken) else gap.stop)
            occupant[shown, gap.slot], phase[shown, gap.slot] = gap.occupant, Phase.PREEMPTED
        return [
            bar
            for slot in range(self.num_slots)
            for bar in _runs(
                slot, occupant[:, slot], phase[:, slot], steps.num_new[:, slot], steps.sampled[:, slot].astype(np.int32)
            )
        ]

    def num_without_slot(self, steps: Steps) -> Int64[np.ndarray, " n"]:
        """Sequences that were preempted and had not resumed, in each step."""
        change = np.zeros(len(steps) + 1, np.int64)
        for gap in self.gaps(steps):
            change[gap.start] += 1
            change[gap.stop] -= 1
        return np.cumsum(change)[:-1]

    def summary(self) -> str:
        """One line for people."""
        steps = self.steps()
        peak = self.num_pages - int(np.min(steps.num_free_pages, initial=self.num_pages))
        return (
            f"{len({occupant.request_id for occupant in self.occupants})} requests, {len(steps)} steps, mean occupancy "
            f"{steps.mean_occupancy:.0%} of {self.num_slots} slots, at most {peak} of {self.num_pages} pages in use, "
            f"{int(np.sum(steps.num_preempted))} preemptions"
        )

    def save(self, path: str) -> None:
        """Draws the picture.

        Args:
          path: ends in .html (one file that needs no other; hovering tells what a bar is) or .png (needs matplotlib).

        Raises:
          ValueError: if the path has another ending, the file cannot be written, or matplotlib is not there.
        """
        check_path(path)
        if path.lower().endswith(".html"):
            from jaxserve.timeline.html import render

            content = render(self).encode("utf-8")
        else:
            from jaxserve.timeline.png import draw

            content = draw(self)
        try:
            pathlib.Path(path).write_bytes(content)
        except OSError as error:
            raise ValueError(f"cannot write the timeline to {path!r}: {error.strerror}") from error


def _runs(
    slot: int,
    occupant: Int32[np.ndarray, " n"],
    phase: Int32[np.ndarray, " n"],
    num_new: Int32[np.ndarray, " n"],
    num_drawn: Int32[np.ndarray, " n"],
) -> Iterator[Bar]:
    """The bars of one slot."""
    if not len(occupant):
        return
    alike = (occupant[1:] == occupant[:-1]) & ((phase[1:] == phase[:-1]) | (occupant[1:] < 0))
    bounds = [0, *(np.flatnonzero(~alike) + 1).tolist(), len(occupant)]
    before, odd = -1, True
    for start, stop in itertools.pairwise(bounds):
        index = int(occupant[start])
        if index < 0:
            continue
        odd = odd if index == before else not odd
        before, kind = index, Phase(int(phase[start]))
        counted = num_drawn if kind == Phase.DECODE else num_new
        yield Bar(slot, start, stop, index, kind, int(np.sum(counted[start:stop])), odd)


def check_path(path: str) -> None:
    """Looks whether a timeline can be saved there, before there is one.

    Raises:
      ValueError: if not.
    """
    file = pathlib.Path(path)
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"the timeline {path!r} must be a file that ends in {' or '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise ValueError(f"the timeline {path!r} cannot be written: there is no directory {str(file.parent)!r}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"the timeline {path!r} cannot be written: choose a file that may be")
    if file.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"the timeline {path!r} needs matplotlib, which is not installed: pip install matplotlib, or name it "
            f"{file.with_suffix('.html').name!r}, which needs nothing"
        )


@contextlib.contextmanager
def recording(engine: Engine, path: str | None) -> Iterator[Timeline | None]:
    """Records what the engine does meanwhile, and saves the picture in the end; nothing of this if `path` is None.

    Raises:
      ValueError: before anything is recorded, if the file cannot be.
    """
    if path is None:
        yield None
        return
    check_path(path)
    timeline, before = Timeline(engine.config), engine.observer
    engine.observer = timeline.observe
    try:
        yield timeline
    finally:
        engine.observer = before
        timeline.save(path)
