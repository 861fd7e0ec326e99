"""States of an engine in the middle of its service, whose steps the scaling benchmark times.

A sweep varies one quantity and nothing else. Capacities stay too: every case has the longest sequence and the pages of the
largest case, so the sweep shows the cost of work and not the cost of capacity (the sweeps "capacity" and "pages" show that).
Slots in use decode; their pages are scattered over the pool, as after a long service.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxserve import EngineConfig, EngineState, ModelConfig, Status, init_state
from jaxserve.core.cache import PageTable

_WAITING_PROMPT = 8  # tokens of a sequence that waits
_SHORT = 64  # tokens of the short sequences beside a long one


@dataclasses.dataclass(frozen=True)
class Base:
    """The sizes that a sweep does not vary.

    Attributes:
      slots: number of slots, all in use.
      context: tokens of each sequence at first.
      vocab_size: tokens of the model's vocabulary.
      num_steps: steps per timed call; every sequence has room for them.
      page_size: tokens per page.
    """

    slots: int
    context: int
    vocab_size: int
    num_steps: int
    page_size: int


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one state.

    Attributes:
      sweep: name of the sweep.
      value: value of the quantity that the sweep varies.
      slots: number of slots.
      lengths: tokens of the sequences in slots, from slot 0 on; further slots are not in use.
      vocab_size: tokens of the vocabulary.
      max_model_len: tokens of the longest sequence that there is room for.
      num_pages: pages of the pool.
      queue_size: rows of the queue.
      waiting: sequences that wait for a slot.
      turnover: sequences that end in each step; as many are admitted in the next one.
      series: name of the curve, where a sweep has several.
    """

    sweep: str
    value: int
    slots: int
    lengths: tuple[int, ...]
    vocab_size: int
    max_model_len: int = 0
    num_pages: int = 0
    queue_size: int = 0
    waiting: int = 0
    turnover: int = 0
    series: str = ""

    def longest(self, num_steps: int) -> int:
        """Returns the tokens that a sequence must have room for."""
        more = max(num_steps, self.slots // self.turnover if self.turnover else 0)
        return max(*self.lengths, _WAITING_PROMPT) + more + 2 if self.lengths else _WAITING_PROMPT + 2

    def config(self, engine: EngineConfig, num_steps: int) -> EngineConfig:
        """Returns the engine's configuration with the capacities of this case."""
        return dataclasses.replace(
            engine,
            max_slots=self.slots,
            max_model_len=self.max_model_len,
            num_pages=self.num_pages,
            max_queue=self.queue_size,
            max_steps_per_call=num_steps,
        )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A quantity that is varied.

    Attributes:
      values: values by default.
      lowest: lowest value that is allowed.
      unit: (number, name) of the unit in which the slope of the cost is given.
      flat: True if the scheduler's cost should not depend on it at all.
      make: makes the cases of one value.
      of_model: True if the sweep is useful for the step with the model too.
    """

    values: tuple[int, ...]
    lowest: int
    unit: tuple[int, str]
    flat: bool
    make: Callable[[Base, int], list[Case]]
    of_model: bool = True


def _slots(base: Base, value: int) -> list[Case]:
    return [Case("slots", value, value, (base.context,) * value, base.vocab_size)]


def _active(base: Base, value: int) -> list[Case]:
    if value > base.slots:
        raise ValueError(f"--points: {value} slots in use are more than --slots={base.slots}: raise that")
    return [Case("active", value, base.slots, (base.context,) * value, base.vocab_size)]


def _long(base: Base, value: int) -> list[Case]:
    """Makes a case of one long sequence among short ones, and one of as many tokens evenly spread."""
    one = (value, *(_SHORT,) * (base.slots - 1))
    each, more = divmod(sum(one), base.slots)
    even = (each + 1,) * more + (each,) * (base.slots - more)
    return [
        Case("long", value, base.slots, lengths, base.vocab_size, series=series)
        for series, lengths in (("one long", one), ("even", even))
    ]


def _context(base: Base, value: int) -> list[Case]:
    return [Case("context", value, base.slots, (value,) * base.slots, base.vocab_size)]


def _capacity(base: Base, value: int) -> list[Case]:
    least = base.context + base.num_steps + 2
    if value < least:
        raise ValueError(f"--points: a longest sequence of {value} tokens has no room for {least}: lower --context")
    return [Case("capacity", value, base.slots, (base.context,) * base.slots, base.vocab_size, value)]


def _pages(base: Base, value: int) -> list[Case]:
    return [Case("pages", value, base.slots, (base.context,) * base.slots, base.vocab_size, num_pages=value)]


def _queue(base: Base, value: int) -> list[Case]:
    return [
        Case(
            "queue",
            value,
            base.slots,
            (base.context,) * base.slots,
            base.vocab_size,
            queue_size=base.slots + value,
            waiting=value,
        )
    ]


def _vocabulary(base: Base, value: int) -> list[Case]:
    return [Case("vocabulary", value, base.slots, (base.context,) * base.slots, value)]


def _turnover(base: Base, value: int) -> list[Case]:
    """Makes a case of staggered sequences of slots / value tokens each, with enough waiting for all steps of a call."""
    if value and base.slots % value:
        raise ValueError(f"--points: a turnover of {value} must divide --slots={base.slots}")
    lengths, waiting = (base.context,) * base.slots, value * base.num_steps
    return [Case("turnover", value, base.slots, lengths, base.vocab_size, waiting=waiting, turnover=value)]


SWEEPS = {
    "slots": Sweep((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 1, (1, "slot"), False, _slots),
    "active": Sweep((0, 4, 8, 16, 24, 32), 0, (1, "slot in use"), True, _active),
    "long": Sweep((64, 512, 1024, 2048, 4096), 2, (1000, "1000 tokens"), True, _long),
    "context": Sweep((64, 256, 1024, 4096), 2, (1000, "1000 tokens per sequence"), True, _context),
    "capacity": Sweep((1024, 4096, 16384, 65536), 2, (1000, "1000 tokens of the longest"), True, _capacity, False),
    "pages": Sweep((1_000, 10_000, 100_000, 1_000_000), 1, (1000, "1000 pages"), True, _pages),
    "queue": Sweep((0, 128, 1024, 4096, 16384), 0, (1000, "1000 waiting"), False, _queue),
    "vocabulary": Sweep((1024, 8192, 32768, 131072, 262144), 64, (1000, "1000 tokens"), True, _vocabulary),
    "turnover": Sweep((0, 1, 2, 4, 8, 16), 0, (1, "sequence that ends"), False, _turnover, False),
}


def make_cases(name: str, base: Base, values: Sequence[int] = ()) -> list[Case]:
    """Makes the cases of a sweep, with equal capacities where it does not vary them.

    Args:
      name: a key of SWEEPS.
      base: sizes that are not varied.
      values: values in place of the default ones; default ones that do not fit the base are left out.

    Raises:
      ValueError: if one of `values` is too low, or does not fit the base.
    """
    sweep = SWEEPS[name]
    fitting = tuple(value for value in sweep.values if _fits(name, base, value))
    for value in values:
        if value < sweep.lowest:
            raise ValueError(f"--points: {value} is below {sweep.lowest}, the least of --sweep={name}")
    cases = [case for value in sorted(values or fitting) for case in sweep.make(base, value)]
    longest = max(case.longest(base.num_steps) for case in cases)
    most = max((case.slots + case.waiting for case in cases if case.turnover), default=0)
    cases = [
        dataclasses.replace(
            case,
            max_model_len=case.max_model_len or longest,
            queue_size=case.queue_size or max(4 * case.slots, most),
        )
        for case in cases
    ]
    needed = max(case.slots * -(-case.max_model_len // base.page_size) for case in cases)
    cases = [dataclasses.replace(case, num_pages=case.num_pages or needed) for case in cases]
    too_few = [case.num_pages for case in cases if case.num_pages < needed]
    if too_few:
        if values:
            raise ValueError(f"--points: {too_few[0]} pages are fewer than the {needed} that all slots may need")
        cases = [case for case in cases if case.num_pages >= needed]
    return cases


def _fits(name: str, base: Base, value: int) -> bool:
    """Returns whether a default value makes sense with the sizes that are not varied."""
    return {
        "active": value <= base.slots,
        "turnover": not value or base.slots % value == 0,
        "capacity": value >= base.context + base.num_steps + 2,
    }.get(name, True)


def busy_state(case: Case, model: ModelConfig, config: EngineConfig, seed: int) -> EngineState:
    """Makes the state of a case; its pool is None."""
    state = jax.jit(lambda: init_state(model, config).replace(pool=None))()
    rng = np.random.default_rng(seed)
    active, used = len(case.lengths), len(case.lengths) + case.waiting
    lengths = np.array([*case.lengths, *(_WAITING_PROMPT,) * case.waiting], np.int32)
    row = np.arange(used, dtype=np.int32)
    queue = state.queue
    queue = queue.replace(
        tokens=queue.tokens.at[:active].set(rng.integers(0, case.vocab_size, (active, case.max_model_len), np.int32)),
        prompt_length=queue.prompt_length.at[:used].set(np.where(row < active, lengths - 1, lengths)),
        num_tokens=queue.num_tokens.at[:used].set(lengths),
        max_length=queue.max_length.at[:used].set(_ends(case, lengths)),
        arrival=queue.arrival.at[:used].set(row),
        group=queue.group.at[:used].set(row),
        status=queue.status.at[:used].set(np.where(row < active, int(Status.RUNNING), int(Status.WAITING))),
    )
    return state.replace(
        queue=queue,
        slots=state.slots.replace(
            row_id=state.slots.row_id.at[:active].set(row[:active]),
            num_computed=state.slots.num_computed.at[:active].set(lengths[:active] - 1),
        ),
        table=_scattered(state, case, config, rng),
        next_arrival=jnp.asarray(used, jnp.int32),
    )


def _ends(case: Case, lengths: Int32[np.ndarray, " U"]) -> Int32[np.ndarray, " U"]:
    """Returns the length at which each sequence ends; without a turnover none ends while steps are timed."""
    if not case.turnover:
        return np.full_like(lengths, case.max_model_len)
    row = np.arange(len(lengths))
    left = np.where(row < case.slots, row // case.turnover + 1, case.slots // case.turnover)
    return (lengths + left).astype(np.int32)


def _scattered(state: EngineState, case: Case, config: EngineConfig, rng: np.random.Generator) -> PageTable:
    """Makes a page table in which each slot holds the pages of its tokens, drawn from all over the pool."""
    table, num_pages = state.table, case.num_pages
    pages_of_slots = [-(-length // config.page_size) for length in case.lengths]
    num_used = sum(pages_of_slots)
    order = rng.permutation(num_pages).astype(np.int32)
    page_ids = np.full(table.page_ids.shape, num_pages, np.int32)
    for slot, (end, count) in enumerate(zip(np.cumsum(pages_of_slots), pages_of_slots, strict=True)):
        page_ids[slot, :count] = order[end - count : end]
    free = np.zeros(num_pages, np.int32)
    free[: num_pages - num_used] = order[num_used:]
    count = np.zeros(num_pages, np.int32)
    count[order[:num_used]] = 1
    return table.replace(
        page_ids=jnp.asarray(page_ids),
        free=jnp.asarray(free),
        num_free=jnp.asarray(num_pages - num_used, jnp.int32),
        reference_count=jnp.asarray(count),
    )
