"""The device's side of an engine: weights, state, compiled programs, and the calls in flight.

A call is one `run_steps` of up to n steps. One `update` precedes it if anything was submitted, collected or aborted since the
call before. The size of an `update` depends on what changed: its submission has 4 rows, or as many as there are slots if more
samples are submitted, and it has no submission if rows were only collected or aborted.
"""

import collections
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.programs import Changes
from jaxserve.core.scheduler import EngineState, Handles, Status
from jaxserve.core.step import StepOutputs
from jaxserve.engine.capacity import platform_of
from jaxserve.engine.intake import Intake
from jaxserve.engine.live_requests import LiveSample
from jaxserve.engine.memory import keep_buffers, release_zeros, trim
from jaxserve.engine.programs import engine_programs
from jaxserve.engine.transport import PackedOutputs, Reader
from jaxserve.engine.weights import Weights
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params

_NARROW_SUBMISSION = 4  # rows


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that has been dispatched and not read yet."""

    dispatch_time: float
    submitted: list[LiveSample]
    handles: Handles | None  # handles of `submitted`; None if nothing was submitted
    outputs: PackedOutputs


class Driver:
    """Runs an engine's programs over its state, and knows which sample is in which queue row.

    Attributes:
      weights: the weights that the next call uses.
      programs: the compiled programs.
      samples_by_row: samples in queue rows that have not ended there, as of the last call read.
      calls: the calls in flight, the oldest first.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: EngineConfig,
        intake: Intake,
        *,
        logits_fn: LogitsFn | None,
        aux: Any,
    ) -> None:
        """Allocates the state; arguments as for the Engine, with all capacities chosen."""
        self.weights = Weights(params, model, config)
        self._config, self._intake = config, intake
        where = self.weights.replicated
        self._aux = jax.tree.map(lambda leaf: jax.device_put(leaf, where) if isinstance(leaf, jax.Array) else leaf, aux)
        self.programs = engine_programs(model, config, self.weights.structure, where, logits_fn)
        self._reader = Reader(config)
        self._widths = sorted({min(_NARROW_SUBMISSION, config.max_slots), config.max_slots})
        self._warm = False
        self._state: EngineState | None = None
        self.calls: collections.deque[Call] = collections.deque()
        self.reset()

    @property
    def state(self) -> EngineState:
        """The state on the device; the next call donates it."""
        if self._state is None:
            raise RuntimeError("the engine has no state, because making it failed: make another engine")
        return self._state

    @property
    def has_work(self) -> bool:
        """Whether a row has not ended on the device yet, or a call has not been read yet."""
        return bool(self.samples_by_row or self.calls)

    @property
    def num_in_flight(self) -> int:
        """The number of samples submitted with calls that have not been read."""
        return sum(len(call.submitted) for call in self.calls)

    @property
    def num_places(self) -> int:
        """The number of samples that the next call may submit."""
        num_free = self._config.queue_size - self._num_on_device + len(self._to_collect)
        return min(num_free, self._config.max_slots)

    def reset(self) -> None:
        """Forgets everything on the device but the weights.

        The old arrays are released before new ones are made, because two pools do not fit where one takes most of the memory.
        Arrays that were donated to a call that failed have been released already.
        """
        for leaf in jax.tree.leaves((self._state, [(call.handles, call.outputs) for call in self.calls])):
            if not leaf.is_deleted():
                leaf.delete()
        self._state = None
        self.calls.clear()
        self.samples_by_row: dict[int, LiveSample] = {}
        self._generation: Any = np.zeros(self._config.queue_size, np.int32)  # of each row, as last submitted
        self._to_collect: list[int] = []  # rows that have ended
        self._num_on_device = 0  # rows that are not free
        state = self._state = self.programs.init(aux=self._aux)
        release_zeros(jax.tree.leaves((state.pool, state.seen)))

    def warm_up(self) -> float:
        """Compiles all programs, and returns how many seconds that took; 0 if they were compiled already."""
        if self._warm:
            return 0.0
        start = time.monotonic()
        # Two rounds, because with sharded weights the state that comes back may have another sharding than the first one.
        for width in (0, *self._widths) * 2:
            self._state, _ = self.programs.update(self.state, self._changes([], [], width))
            self._state, outputs = self.programs.run_steps(self.weights.leaves, self._state, np.int32(0))
            jax.device_get((outputs.packed, outputs.prompt))
        trim()
        if platform_of(self.weights.leaves[0]) == "cpu":
            keep_buffers()
        self._warm = True
        return time.monotonic() - start

    def dispatch(self, submitted: list[LiveSample], max_steps: int) -> int:
        """Dispatches a call of up to `max_steps` steps that begins with these samples, at most `num_places`.

        The call collects the rows that have ended. It aborts the rows of aborted requests, and of samples that have ended with
        a stop string, because only the host looks for those.

        Returns:
          The number of compiled programs that were called.
        """
        aborted = [row for row, sample in self.samples_by_row.items() if sample.live.abort_requested or sample.finished]
        has_changes, handles = bool(submitted or aborted or self._to_collect), None
        if has_changes:
            width = next((width for width in self._widths if width >= len(submitted)), 0) if submitted else 0
            changes = self._changes(submitted, aborted, width)
            self._num_on_device += len(submitted) - len(self._to_collect)
            self._to_collect = []
            self._state, handles = self.programs.update(self.state, changes)
        self._state, outputs = self.programs.run_steps(self.weights.leaves, self.state, np.int32(max_steps))
        self.calls.append(Call(time.monotonic(), submitted, handles, outputs))
        return 1 + has_changes

    def read(self, call: Call, *, prompt_logprobs: bool) -> StepOutputs:
        """Waits for a call that was taken out of `calls`, and returns its outputs.

        Args:
          call: the oldest call.
          prompt_logprobs: whether to read the log probabilities of prompt tokens too.
        """
        prompt = call.outputs.prompt if prompt_logprobs else None
        handles, packed, prompt = jax.device_get((call.handles, call.outputs.packed, prompt))
        if handles is not None:
            for sample, row, generation in zip(call.submitted, handles.row_id, handles.generation, strict=False):
                self.samples_by_row[int(row)] = sample
                self._generation[row] = generation
        return self._reader.unpack(packed, prompt)

    def end_rows(self, outputs: StepOutputs) -> None:
        """Ends the samples whose rows have ended in a call, and forgets the rows."""
        statuses, num_preemptions = outputs.status.tolist(), outputs.num_preemptions.tolist()
        for row, sample in list(self.samples_by_row.items()):
            status = Status(statuses[row])
            sample.num_preemptions = num_preemptions[row]
            if status >= Status.STOP:
                del self.samples_by_row[row]
                self._to_collect.append(row)
                sample.finish(status)

    def _changes(self, submitted: list[LiveSample], aborted: list[int], width: int) -> Changes:
        """Makes the argument of `update`; with `width` 0 it has no submission."""
        return Changes(
            submission=self._intake.submission(submitted, width) if width else None,
            collected=self._mask(self._to_collect),
            aborted=self._mask(aborted),
            generation=self._generation.copy(),
        )

    def _mask(self, rows: Iterable[int]) -> Any:
        mask = np.zeros(self._config.queue_size, bool)
        mask[list(rows)] = True
        return mask
