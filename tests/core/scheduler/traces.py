"""Random traces for the scheduler, run by jaxserve and by the oracle side by side.

The oracle goes first: it needs nothing from the device to know which handles exist, so a whole stretch of operations is
made up and predicted on the host, run on the device as one `lax.scan`, read back at once and compared step by step.

The stub model writes a mark (sequence number, position) where a model would write keys and values, and reads back the
marks of all computed tokens through the page table: so a page granted twice, or at a wrong place, is seen. Before the last
token of a prompt the number is that of the sequence's group: samples of one request may share these, and nothing else.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import copy_pages
from jaxserve.core.logit_rules import LogitRules, plain_rules
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import SamplingArrays, greedy_arrays
from jaxserve.core.scheduler import check_invariants, submission, transitions
from jaxserve.core.scheduler.state import EngineState, Status, init_state
from jaxserve.core.scheduler.submission import Handles, Submission
from jaxserve.core.scheduler.transitions import Plan
from jaxserve.models import ModelConfig
from tests.core.scheduler.oracle import VOCAB_SIZE, Limits, Oracle, Request, StepRecord
from tests.core.scheduler.submissions import Driver, Planned

MODEL = ModelConfig("llama", VOCAB_SIZE, 2, 2, 1, 1, 1, 2)


@dataclasses.dataclass(frozen=True)
class TinyConfig(EngineConfig):
    """A configuration with pages of any size: only the kernels need pages of at least 8 tokens."""

    tile_rows: int | None = 1
    max_logprobs: int = 0
    max_stop_token_ids: int = 2
    kv_dtype: str | None = "float32"

    def __post_init__(self) -> None:
        pass


CONFIGS: dict[str, EngineConfig] = {
    # The smallest pool allowed: one longest sequence fills it.
    "minimal pool": TinyConfig(max_slots=3, num_pages=6, page_size=2, max_model_len=12, chunk_size=3, max_queue=8),
    "one token per page": TinyConfig(max_slots=2, num_pages=9, page_size=1, max_model_len=7, chunk_size=1, max_queue=5),
    # Pages do not divide the longest sequence, nor chunks the pages.
    "uneven": TinyConfig(max_slots=5, num_pages=15, page_size=4, max_model_len=22, chunk_size=7, max_queue=12),
    "more pages than needed": TinyConfig(
        max_slots=4, num_pages=40, page_size=3, max_model_len=16, chunk_size=16, max_queue=6
    ),
    "as users may have it": EngineConfig(
        max_slots=4,
        num_pages=6,
        page_size=8,
        max_model_len=30,
        chunk_size=12,
        max_stop_token_ids=2,
        kv_dtype="float32",
    ),
}


class Mismatch(AssertionError):
    """The device and the oracle disagree."""


@record
class Operations(Record):
    """The operations on the state before one step."""

    submission: Submission
    collected: Bool[Array, " Q"]
    collected_generation: Int32[Array, " Q"]
    aborted: Bool[Array, " Q"]
    aborted_generation: Int32[Array, " Q"]


@record
class Observation(Record):
    """The visible results of one step."""

    handles: Handles
    plan: Plan
    slot_row: Int32[Array, " S"]  # queue row in each slot while the model runs
    marks_intact: Bool[Array, " S"]  # whether all computed tokens are found through the page table, on writable pages
    state: EngineState  # after the step; without pool, sampling parameters


def run_operations(
    state: EngineState, marks: Int32[Array, "N T"], operations: Operations, *, config: EngineConfig
) -> tuple[tuple[EngineState, Array], Observation]:
    """Applies stacked operations, a step after each."""

    def one(carry: tuple[EngineState, Array], operations: Operations) -> tuple[tuple[EngineState, Array], Observation]:
        state, marks = carry
        state = submission.collect(state, operations.collected, operations.collected_generation)
        state = submission.abort(state, operations.aborted, operations.aborted_generation)
        state, handles = submission.submit(state, operations.submission, model=MODEL, config=config)
        state, marks, observation = stub_step(state, marks, config=config)
        return (state, marks), observation.replace(handles=handles)

    return lax.scan(one, (state, marks), operations)


def stub_step(
    state: EngineState, marks: Int32[Array, "N T"], *, config: EngineConfig
) -> tuple[EngineState, Int32[Array, "N T"], Observation]:
    """A step of the engine with the stub in place of the model."""
    state, plan = transitions.schedule(state, config=config)
    slots, queue = state.slots, state.queue
    marks = write_marks(state, copy_pages(marks, plan.copy_from, plan.copy_to), plan, config=config)
    number = queue.arrival.at[slots.row_id].get(mode="fill", fill_value=0)
    position = queue.num_tokens.at[slots.row_id].get(mode="fill", fill_value=0)
    after = transitions.finish_step(state, plan.num_new, stub_tokens(number, position))
    observation = Observation(
        handles=None,
        plan=plan,
        slot_row=slots.row_id,
        marks_intact=marks_intact(state, marks, plan, config=config),
        state=after.replace(pool=None, queue=after.queue.replace(sampling=None)),
    )
    return after, marks, observation


def stub_tokens(number: Int32[Array, " S"], position: Int32[Array, " S"]) -> Int32[Array, " S"]:
    """`oracle.stub_token` for arrays. Slots that do not sample get one too, which must not count."""
    return ((number % 1009 * 40503 + position * 9973 + number % 7 * (position % 5) * 31) % 65521) % VOCAB_SIZE


def write_marks(
    state: EngineState, marks: Int32[Array, "N T"], plan: Plan, *, config: EngineConfig
) -> Int32[Array, "N T"]:
    """Marks the place of each row of the plan, as a model would write its keys and values there."""
    row = state.slots.row_id.at[plan.slot].get(mode="fill", fill_value=config.queue_size)
    mark = mark_of(state, row, plan.position, config=config)
    page = state.table.page_ids.at[plan.slot, plan.position // config.page_size].get(
        mode="fill", fill_value=state.table.num_pages
    )
    return marks.at[page, plan.position % config.page_size].set(mark, mode="drop")


def mark_of(
    state: EngineState, row: Int32[Array, "*rows"], position: Int32[Array, "*rows"], *, config: EngineConfig
) -> Int32[Array, "*rows"]:
    """Returns the mark of the token at `position` of the sequence in queue row `row`."""
    queue = state.queue
    number, group, length = (
        leaf.at[row].get(mode="fill", fill_value=0) for leaf in (queue.arrival, queue.group, queue.prompt_length)
    )
    return jnp.where(position < length - 1, group, number) * config.max_model_len + position


def marks_intact(
    state: EngineState, marks: Int32[Array, "N T"], plan: Plan, *, config: EngineConfig
) -> Bool[Array, " S"]:
    """Whether each slot finds all its computed tokens, on pages that are its own where it writes to them."""
    slots = state.slots
    positions = jnp.tile(jnp.arange(config.max_model_len, dtype=jnp.int32), (config.max_slots, 1))
    page = state.table.page_ids[:, positions[0] // config.page_size]
    row = jnp.tile(slots.row_id[:, None], (1, config.max_model_len))
    found = marks.at[page, positions % config.page_size].get(mode="fill", fill_value=-1)
    own = state.table.reference_count.at[page].get(mode="fill", fill_value=0) == 1
    written = positions >= slots.num_computed[:, None]
    computed = state.active[:, None] & (positions < (slots.num_computed + plan.num_new)[:, None])
    intact = (own | ~written) & (found == mark_of(state, row, positions, config=config))
    return jnp.all(~computed | intact, axis=1)


# XLA options under which the scheduler compiles in half the time; it runs slower, which matters to long runs only.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones know this option no more
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False


class Device:
    """The compiled side. Make a new one for every patched scheduler, because a patch has an effect only while tracing."""

    def __init__(
        self, config: EngineConfig, *, steps_per_call: int = 128, compiler_options: dict[str, Any] | None = None
    ):
        self.config = config
        self.steps_per_call = steps_per_call

        def compiled(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
            return jax.jit(lambda *args: function(*args, **static), compiler_options=compiler_options or {})

        self._run = compiled(run_operations, config=config)
        self.step = compiled(stub_step, config=config)
        self.submit = compiled(submission.submit, model=MODEL, config=config)
        self.abort = compiled(submission.abort)
        self.collect = compiled(submission.collect)

    def start(self) -> tuple[EngineState, Int32[Array, "N T"]]:
        """An empty state, and no marks."""
        marks = jnp.full((self.config.num_pages, self.config.page_size), -1, jnp.int32)
        return init_state(MODEL, self.config), marks

    def run(
        self, carry: tuple[EngineState, Int32[Array, "N T"]], operations: Operations
    ) -> tuple[tuple[EngineState, Int32[Array, "N T"]], list[Observation]]:
        """Runs stacked operations. Returns the state and the marks, and one observation per step, on the host."""
        carry, observations = self._run(*carry, operations)
        leaves, structure = jax.tree.flatten(jax.device_get(observations))
        steps = range(self.steps_per_call)
        return carry, [jax.tree.unflatten(structure, [leaf[step] for leaf in leaves]) for step in steps]


# What the device shows and what the oracle predicts, in the same words.


def seen(observation: Observation, config: EngineConfig) -> dict[str, Any]:
    """Returns the observation of a step, in numpy arrays."""
    plan, handles, batch_size = observation.plan, observation.handles, int(observation.plan.batch_size)
    slots, positions = plan.slot.tolist(), plan.position.tolist()
    shown = seen_state(observation.state, config) | {
        "batch rows": list(zip(slots[:batch_size], positions[:batch_size], strict=True)),
        "rows beyond the batch": [slot for slot in slots[batch_size:] if slot < config.max_slots],
        "num_new": plan.num_new.tolist(),
        "slots while the model ran": [
            row if row < config.queue_size else None for row in observation.slot_row.tolist()
        ],
        "slots that lost marks": np.flatnonzero(~observation.marks_intact).tolist(),
    }
    return shown if handles is None else shown | {"handles": seen_handles(handles, config)}


def seen_handles(handles: Handles, config: EngineConfig) -> list[tuple[int, int] | None]:
    """Returns handles (row, generation); None where there is none."""
    pairs = zip(handles.row_id.tolist(), handles.generation.tolist(), strict=True)
    return [pair if pair[0] < config.queue_size else None for pair in pairs]


def seen_state(state: EngineState, config: EngineConfig) -> dict[str, Any]:
    """Returns the visible parts of a state, in numpy arrays."""
    queue, slots = state.queue, state.slots
    held = (state.table.page_ids < config.num_pages).sum(axis=1)
    fields = (
        queue.status,
        queue.generation,
        queue.abort_requested,
        queue.num_preemptions,
        queue.num_tokens,
        queue.tokens,
    )
    rows: list[tuple[Any, ...] | None] = []
    for status, generation, abort, preemptions, length, tokens in zip(
        *(field.tolist() for field in fields), strict=True
    ):
        if status == Status.FREE:
            rows.append(None)
        elif status == Status.ERROR:
            rows.append(("error", generation))
        else:
            rows.append((_STATUS_NAMES[status], generation, abort, preemptions, tokens[:length]))
    places = zip(slots.row_id.tolist(), slots.num_computed.tolist(), held.tolist(), strict=True)
    return {
        "rows": rows,
        "slots (row, tokens computed, pages held)": [
            place if place[0] < config.queue_size else None for place in places
        ],
        "free pages": int(state.table.num_free),
    }


def predicted(oracle: Oracle, step: StepRecord) -> dict[str, Any]:
    """Returns the oracle's prediction of `seen` after a step, without handles."""
    return predicted_state(oracle) | {
        "batch rows": step.decode_rows + step.prefill_rows,
        "rows beyond the batch": [],
        "num_new": step.num_new,
        "slots while the model ran": step.slot_rows,
        "slots that lost marks": [],
    }


def predicted_state(oracle: Oracle) -> dict[str, Any]:
    """Returns the oracle's prediction of `seen_state`."""
    rows: list[tuple[Any, ...] | None] = []
    for row in oracle.rows:
        if row is None:
            rows.append(None)
        elif row.status == "error":
            rows.append(("error", row.generation))
        else:
            rows.append((row.status, row.generation, row.abort_requested, row.num_preemptions, list(row.tokens)))
    return {
        "rows": rows,
        "slots (row, tokens computed, pages held)": [
            slot and (slot.row, slot.num_computed, len(slot.pages)) for slot in oracle.slots
        ],
        "free pages": len(oracle.free_pages),
    }


def compare(shown: dict[str, Any], expected: dict[str, Any], where: str, num_decode_rows: int = 0) -> None:
    """Raises Mismatch at the first difference. Decode rows come first, in any order."""
    for name, value in expected.items():
        got = shown[name]
        if name == "batch rows":
            got = sorted(got[:num_decode_rows]) + got[num_decode_rows:]
        if got != value:
            raise Mismatch(f"{where}: {name}: the device has {got}, the oracle {value}")


_STATUS_NAMES = {status.value: status.name.lower() for status in Status}


# Both sides, side by side.


def apply(oracle: Oracle, planned: Planned) -> list[tuple[int, int] | None]:
    """Does to the oracle what `run_operations` does to the device before a step. Returns the handles."""
    for row, generation in planned.collections.items():
        oracle.collect(row, generation)
    for row, generation in planned.aborts.items():
        oracle.abort(row, generation)
    return oracle.submit(planned.requests)


def stack(planned: list[Planned], config: EngineConfig) -> Operations:
    """Operations as arrays, [K, ...]."""
    rows = config.queue_size
    collected, collected_generation = _by_row([entry.collections for entry in planned], rows)
    aborted, aborted_generation = _by_row([entry.aborts for entry in planned], rows)
    submissions = [submission_of(entry.requests, config) for entry in planned]
    return Operations(
        submission=jax.tree.map(lambda *leaves: np.stack(leaves), *submissions),
        collected=collected,
        collected_generation=collected_generation,
        aborted=aborted,
        aborted_generation=aborted_generation,
    )


def submission_of(requests: list[Request | None], config: EngineConfig) -> Submission:
    """Requests as numpy arrays; None is padding."""
    width = len(requests)
    tokens = np.zeros((width, config.max_model_len), np.int32)
    stops = np.full((width, config.max_stop_token_ids), -1, np.int32)
    for index, request in enumerate(requests):
        if request is not None:
            tokens[index, : len(request.prompt)] = request.prompt
            stops[index, : len(request.stop_token_ids)] = request.stop_token_ids
    known = [request or Request(prompt=(), max_tokens=0, prompt_length=0) for request in requests]
    sampling, rules = _plain_rows(width, config)
    return Submission(
        tokens=tokens,
        prompt_length=np.array([request.prompt_length for request in known], np.int32),
        max_tokens=np.array([request.max_tokens for request in known], np.int32),
        stop_token_ids=stops,
        stop_sequences=np.full((width, config.max_stop_sequences, config.max_stop_sequence_len), -1, np.int32),
        sampling=sampling,
        rules=rules,
        num_prompt_logprobs=np.array([0 if request.prompt_logprobs else -1 for request in known], np.int32),
        priority=np.array([request.priority for request in known], np.int32),
        follows=np.array([request.follows for request in known]),
        valid=np.array([request is not None for request in requests]),
    )


@functools.cache
def _plain_rows(width: int, config: EngineConfig) -> tuple[SamplingArrays, LogitRules]:
    return jax.device_get((greedy_arrays(width), plain_rules(width, VOCAB_SIZE, config)))


def _by_row(handles: list[dict[int, int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((len(handles), num_rows), bool)
    generation = np.zeros((len(handles), num_rows), np.int32)
    for index, entry in enumerate(handles):
        for row, number in entry.items():
            mask[index, row], generation[index, row] = True, number
    return mask, generation


def limits_of(config: EngineConfig) -> Limits:
    """The oracle's view of a configuration."""
    assert config.num_pages is not None
    return Limits(
        max_slots=config.max_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        chunk_size=config.chunk_size,
        max_model_len=config.max_sequence_len,
        queue_size=config.queue_size,
    )


def run_trace(device: Device, *, seed: int, num_steps: int, keeps_pages: bool = True) -> collections.Counter[str]:
    """Runs at least `num_steps` steps of a random trace on both sides, until the last workload has drained.

    Returns:
      The oracle's event counts, and the number of steps as "steps".

    Raises:
      Mismatch: at the first step after which device and oracle differ.
      InvariantError: at the first step after which the state contradicts itself.
    """
    config = device.config
    oracle = Oracle(limits_of(config), keeps_pages=keeps_pages)
    driver = Driver(random.Random(seed), oracle)
    carry = device.start()
    pool, num_done = carry[0].pool, 0
    while num_done < num_steps or oracle.has_work():
        planned, expected, num_decode_rows = [], [], []
        for _ in range(device.steps_per_call):
            operations = driver.next_operations(may_start=num_done < num_steps)
            handles = apply(oracle, operations)
            step = oracle.step()
            planned.append(operations)
            expected.append(predicted(oracle, step) | {"handles": handles})
            num_decode_rows.append(len(step.decode_rows))
        carry, observations = device.run(carry, stack(planned, config))
        for index, observation in enumerate(observations):
            where = f"seed {seed}, step {num_done + index}"
            compare(seen(observation, config), expected[index], where, num_decode_rows[index])
            check_invariants(observation.state.replace(pool=pool))
        num_done += device.steps_per_call
    assert sorted(number for number, _ in oracle.endings) == list(range(oracle.num_arrived)), (
        "not all ended exactly once"
    )
    return oracle.events + collections.Counter(steps=num_done)
