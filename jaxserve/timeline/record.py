"""The record of a timeline: which sequence was in which slot in each step, and what it did there.

    timeline = Timeline(engine.config)
    engine.observer = timeline.observe
    engine.generate(prompts)
    bars = timeline.bars()

A picture has slots from top to bottom and steps from left to right; each sequence is a bar in its slot, coloured by phase.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxserve.config import EngineConfig
from jaxserve.core.scheduler import Status

if TYPE_CHECKING:  # types of the records; importing a timeline must not import the engine
    from jaxserve.core.step import StepOutputs
    from jaxserve.engine.live_requests import LiveSample


class Phase(enum.IntEnum):
    """What a sequence does in a step."""

    PREFILL = 0
    RECOMPUTE = 1  # prefill again, after a preemption
    DECODE = 2  # it computes the keys and values of one token and samples the next
    STALLED = 3  # it has a slot, but other prompts fill the step's chunk
    PREEMPTED = 4  # it has no slot; it is shown in its old one until another sequence gets that


@dataclasses.dataclass
class Occupant:
    """A sequence that had a slot at some time."""

    request_id: str
    sample: int | None  # the index of the sample; None: the request has only one
    prompt_length: int  # tokens
    finish_reason: str | None = None  # None: not finished
    end_call: int | None = None  # first step of the call whose outputs report its end

    @property
    def name(self) -> str:
        """The name of the sequence, as in printed results."""
        return self.request_id if self.sample is None else f"{self.request_id}[{self.sample}]"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What happened in each step."""

    occupant: Int32[np.ndarray, "n S"]  # index of the sequence in each slot; -1: the slot is free
    num_new: Int32[np.ndarray, "n S"]  # tokens whose keys and values were computed
    sampled: Bool[np.ndarray, "n S"]  # whether a token was sampled
    num_free_pages: Int32[np.ndarray, " n"]
    num_waiting: Int32[np.ndarray, " n"]  # samples on device and host without a slot
    num_preempted: Int32[np.ndarray, " n"]  # sequences that lost their slot in this step

    def __len__(self) -> int:
        return len(self.occupant)

    @property
    def mean_occupancy(self) -> float:
        """The share of the slots in use, averaged over steps."""
        return float(np.mean(self.occupant >= 0)) if self.occupant.size else 0.0


@dataclasses.dataclass(frozen=True)
class Gap:
    """The steps during which a sequence has no slot because it was preempted."""

    occupant: int
    slot: int  # the slot that it lost
    start: int  # the step that preempted it
    stop: int  # the first step in which it has a slot again, or has ended


@dataclasses.dataclass(frozen=True)
class Bar:
    """Consecutive steps in which the same sequence was in the same phase in the same slot."""

    slot: int
    start: int
    stop: int
    occupant: int
    phase: Phase
    num_tokens: int  # tokens sampled in these steps if the phase is DECODE, else tokens computed
    odd: bool  # true of every other sequence of a slot, to tell neighbours apart


class Timeline:
    """The record of an engine's steps.

    Attributes:
      num_slots, num_pages: the numbers of slots and pages of the engine.
      num_steps: the number of steps so far.
      occupants: the sequences, in the order in which they first had a slot.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Starts an empty record; `config` is that of an engine, which has chosen all capacities."""
        self.num_slots = config.max_slots
        self.num_pages = config.num_pages or 0
        self.occupants: list[Occupant] = []
        self._index: dict[tuple[int, int, str, int], int] = {}  # row, generation, request id, sample -> occupant
        none, slots = np.zeros(0, np.int32), np.zeros((0, config.max_slots), np.int32)
        self._calls = [Steps(slots, slots, slots.astype(bool), none, none, none)]
        self.num_steps = 0

    def observe(self, outputs: "StepOutputs", samples_by_row: Mapping[int, "LiveSample"], num_waiting: int) -> None:
        """Adds the steps of one call; made to be the `observer` of an engine.

        Args:
          outputs: the outputs of the call as host arrays; the record copies the parts that it keeps.
          samples_by_row: the sample in each row of the queue.
          num_waiting: samples that wait on the host, beside those in the queue.
        """
        done: Any = outputs
        steps, num_steps = done.steps, int(done.num_steps)
        row_id = steps.row_id[:num_steps]
        in_slot = np.bincount(row_id.ravel(), minlength=len(done.status) + 1) > 0
        index = np.full(len(done.status) + 1, -1, np.int32)
        for row, sample in samples_by_row.items():
            if in_slot[row]:
                index[row] = self._index_of(row, int(done.generation[row]), sample)
            if done.status[row] >= Status.STOP:
                self._end(row, int(done.generation[row]), sample, Status(int(done.status[row])))
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

    def _index_of(self, row: int, generation: int, sample: "LiveSample") -> int:
        live = sample.live
        key = (row, generation, live.id, sample.index)
        if key not in self._index:
            self._index[key] = len(self.occupants)
            index = sample.index if len(live.samples) > 1 else None
            self.occupants.append(Occupant(live.id, index, len(live.prompt_token_ids)))
        return self._index[key]

    def _end(self, row: int, generation: int, sample: "LiveSample", status: Status) -> None:
        index = self._index.get((row, generation, sample.live.id, sample.index))
        if index is None:
            return  # aborted before it had a slot
        if sample.finished:  # the host ended it, with a stop string
            status = sample.status
        self.occupants[index].finish_reason = status.finish_reason
        self.occupants[index].end_call = self.num_steps

    def steps(self) -> Steps:
        """Returns all steps so far."""
        names = [field.name for field in dataclasses.fields(Steps)]
        return Steps(**{name: np.concatenate([getattr(call, name) for call in self._calls]) for name in names})

    def gaps(self, steps: Steps) -> list[Gap]:
        """Returns the steps during which preempted sequences had no slot."""
        step, slot = np.nonzero(steps.occupant >= 0)
        occupant = steps.occupant[step, slot]
        order = np.lexsort((step, occupant))
        stays = np.stack([occupant[order], slot[order], step[order]], axis=1).tolist()
        gaps = []
        for (index, place, last), after in itertools.zip_longest(stays, stays[1:]):
            if after is not None and after[0] == index:
                stop = after[2]
            else:
                end_call = self.occupants[index].end_call
                stop = len(steps) if end_call is None else max(end_call, last + 1)
            if stop > last + 1:
                gaps.append(Gap(index, place, last + 1, stop))
        return gaps

    def phases(self, steps: Steps, gaps: list[Gap]) -> Int32[np.ndarray, "n S"]:
        """Returns the phase of the sequence in each slot; the value of a free slot means nothing."""
        resumed = np.full(len(self.occupants) + 1, len(steps))  # first step after a gap; the last entry: no sequence
        for gap in gaps:
            resumed[gap.occupant] = min(resumed[gap.occupant], gap.stop)
        again = np.arange(len(steps))[:, None] >= resumed[steps.occupant]
        working = np.where(again, Phase.RECOMPUTE, Phase.PREFILL)
        working = np.where(steps.sampled & (steps.num_new == 1), Phase.DECODE, working)
        return np.where(steps.num_new > 0, working, Phase.STALLED).astype(np.int32)

    def bars(self) -> list[Bar]:
        """Returns everything there is to draw, slot by slot. Consecutive steps that are alike are one bar."""
        steps = self.steps()
        gaps = self.gaps(steps)
        occupant, phase = steps.occupant.copy(), self.phases(steps, gaps)
        for gap in gaps:
            occupied = np.flatnonzero(steps.occupant[gap.start : gap.stop, gap.slot] >= 0)
            shown = slice(gap.start, gap.start + int(occupied[0]) if len(occupied) else gap.stop)
            occupant[shown, gap.slot], phase[shown, gap.slot] = gap.occupant, Phase.PREEMPTED
        return [
            bar
            for slot in range(self.num_slots)
            for bar in _runs(
                slot, occupant[:, slot], phase[:, slot], steps.num_new[:, slot], steps.sampled[:, slot].astype(np.int32)
            )
        ]

    def num_without_slot(self, steps: Steps) -> Int64[np.ndarray, " n"]:
        """Returns the number of sequences that are preempted and have not resumed, in each step."""
        change = np.zeros(len(steps) + 1, np.int64)
        for gap in self.gaps(steps):
            change[gap.start] += 1
            change[gap.stop] -= 1
        return np.cumsum(change)[:-1]

    def summary(self) -> str:
        """Returns the totals in one sentence."""
        steps = self.steps()
        peak = self.num_pages - int(np.min(steps.num_free_pages, initial=self.num_pages))
        return (
            f"{len({occupant.request_id for occupant in self.occupants})} requests, {len(steps)} steps, mean occupancy "
            f"{steps.mean_occupancy:.0%} of {self.num_slots} slots, at most {peak} of {self.num_pages} pages in use, "
            f"{int(np.sum(steps.num_preempted))} preemptions"
        )


def _runs(
    slot: int,
    occupant: Int32[np.ndarray, " n"],
    phase: Int32[np.ndarray, " n"],
    num_new: Int32[np.ndarray, " n"],
    num_sampled: Int32[np.ndarray, " n"],
) -> Iterator[Bar]:
    """Yields the bars of one slot."""
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
        counted = num_sampled if kind == Phase.DECODE else num_new
        yield Bar(slot, start, stop, index, kind, int(np.sum(counted[start:stop])), odd)
