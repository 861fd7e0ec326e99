"""Random workloads: the submissions, aborts and collections before each step, drawn with the oracle's state in view."""

import collections
import dataclasses
import random
from typing import Any

from tests.core.scheduler.oracle import UNFINISHED, VOCAB_SIZE, Oracle, Request, Sequence

MAX_SUBMITTED = 5  # W, sequences submitted between two steps


@dataclasses.dataclass(frozen=True)
class Workload:
    """How one stretch of a trace behaves; rates are chances per step."""

    num_steps: int
    submit_rate: float
    abort_rate: float
    collect_rate: float
    invalid_rate: float
    stop_rate: float
    group_sizes: tuple[int, ...]  # samples per request
    odd_rate: float  # of samples that differ from the others of their request, or have lost them
    priorities: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    max_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Planned:
    """Operations before one step, on the host."""

    requests: list[Request | None]  # W of them, None is padding
    aborts: dict[int, int]  # row: generation
    collections: dict[int, int]  # row: generation


def draw_workload(rng: random.Random, max_model_len: int) -> Workload:
    """Light and heavy, short and long, ordered by arrival alone or by priorities, extreme ones included."""
    longest = max_model_len - 1
    lengths = [
        tuple(range(1, longest + 1)),
        (1, 1, 2, 3),
        (1, 2, longest // 3),
        (1, longest // 2, longest),
        (longest,),
        tuple(range(longest // 2, longest + 1)),
    ]
    return Workload(
        num_steps=rng.choice((10, 40, 120)),
        submit_rate=rng.choice((0.1, 0.3, 0.7, 1.0)),
        abort_rate=rng.choice((0.0, 0.05, 0.3)),
        collect_rate=rng.choice((0.1, 0.5, 1.0)),
        invalid_rate=rng.choice((0.0, 0.1)),
        stop_rate=rng.choice((0.0, 0.5, 1.0)),
        group_sizes=rng.choice(((1,), (1, 1, 2), (2,), (1, 2, 3, 4), (4,))),
        odd_rate=rng.choice((0.0, 0.2)),
        priorities=rng.choice(((0,), (0,), (-1, 0, 1), (0, 0, 0, 5), (-(2**31), 0, 2**31 - 1))),
        prompt_lengths=rng.choice(lengths),
        max_tokens=rng.choice(((1,), (1, 2, 3), tuple(range(1, longest + 1)), (longest, 2**31 - 1))),
    )


def draw_operations(rng: random.Random, oracle: Oracle, workload: Workload, *, draining: bool) -> Planned:
    """Draws the operations before the next step."""
    requests: list[Request | None] = [None] * MAX_SUBMITTED
    if not draining and rng.random() < workload.submit_rate:
        place = rng.randrange(3)
        while place < MAX_SUBMITTED:
            samples = draw_samples(rng, workload, oracle.limits.max_model_len)[: MAX_SUBMITTED - place]
            requests[place : place + len(samples)] = samples
            place += len(samples) + rng.choice((0, 0, 1, MAX_SUBMITTED))
    aborts: dict[int, int] = {}
    while rng.random() < workload.abort_rate:
        aborts.update(draw_abort(rng, oracle))
    collections: dict[int, int] = {}
    for row, sequence in enumerate(oracle.rows):
        if sequence is None:
            continue
        if sequence.status not in UNFINISHED and rng.random() < workload.collect_rate:
            collections[row] = sequence.generation
        elif rng.random() < 0.02:
            collections[row] = sequence.generation - (sequence.status not in UNFINISHED)
    return Planned(requests, aborts, collections)


def draw_samples(rng: random.Random, workload: Workload, max_model_len: int) -> list[Request]:
    """Draws the samples of one request; some differ from the others in length, priority or group."""
    first = draw_request(rng, workload, max_model_len)
    samples = [first] + [dataclasses.replace(first, follows=True)] * (rng.choice(workload.group_sizes) - 1)
    for index in range(len(samples)):
        if rng.random() < workload.odd_rate:
            other = draw_request(rng, workload, max_model_len)
            odd: list[dict[str, Any]] = [
                {"max_tokens": rng.choice((1, 2, max_model_len))},
                {"priority": first.priority - 1 if first.priority > 0 else first.priority + 1},
                {"prompt_logprobs": True},
                {"follows": True},
                {"prompt": other.prompt, "prompt_length": other.prompt_length},
                {"prompt": first.prompt[1:] + first.prompt[:1]},
            ]
            samples[index] = dataclasses.replace(samples[index], **rng.choice(odd))
    return samples


def draw_request(rng: random.Random, workload: Workload, max_model_len: int) -> Request:
    """Draws one request, sometimes an invalid one."""
    length = rng.choice(workload.prompt_lengths)
    request = Request(
        prompt=tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)),
        max_tokens=rng.choice(workload.max_tokens),
        prompt_length=length,
        priority=rng.choice(workload.priorities),
        stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice((1, 2))))
        if rng.random() < workload.stop_rate
        else (),
    )
    if rng.random() >= workload.invalid_rate:
        return request
    invalid: list[dict[str, Any]] = [
        {"prompt": (), "prompt_length": 0},
        {"prompt": (0,) * max_model_len, "prompt_length": max_model_len},
        {"prompt_length": -1},
        {"prompt": (*request.prompt[:-1], VOCAB_SIZE)},
        {"prompt": (-1, *request.prompt[1:])},
        {"max_tokens": 0},
    ]
    return dataclasses.replace(request, **rng.choice(invalid))


def draw_abort(rng: random.Random, oracle: Oracle) -> dict[int, int]:
    """Draws a handle to abort; all states are equally likely, stale handles and finished sequences included."""
    kinds: dict[str, list[Sequence]] = collections.defaultdict(list)
    for sequence in oracle.rows:
        if sequence is None:
            continue
        kinds["stale"].append(sequence)
        if sequence.status == "waiting":
            kinds["preempted" if sequence.num_preemptions else "waiting"].append(sequence)
        elif sequence.status == "running":
            kinds["decoding" if sequence.is_decoding else "prefilling"].append(sequence)
        else:
            kinds["finished"].append(sequence)
    if not kinds:
        return {}
    kind = rng.choice(sorted(kinds))
    sequence = rng.choice(kinds[kind])
    return {sequence.row: sequence.generation - (kind == "stale")}


class Driver:
    """Draws one workload after another, each followed by a drain, and asserts that drains end in time."""

    def __init__(self, rng: random.Random, oracle: Oracle):
        self._rng, self._oracle, self._max_model_len = rng, oracle, oracle.limits.max_model_len
        self._workload = draw_workload(rng, self._max_model_len)
        self._num_left = self._workload.num_steps
        self._drain_bound = 0

    def next_operations(self, *, may_start: bool) -> Planned:
        """Draws the operations before the next step; with `may_start` False no further workload begins."""
        draining = self._num_left <= 0
        if draining and self._drain_bound == 0:
            unfinished = sum(row is not None and row.status in UNFINISHED for row in self._oracle.rows)
            # The most urgent sequence that runs is never preempted: one sequence at least ends in 2 M steps.
            self._drain_bound = self._num_left - 2 * self._max_model_len * unfinished - 1
        if draining and not self._oracle.has_work() and may_start:
            self._oracle.events["drained"] += 1
            self._workload = draw_workload(self._rng, self._max_model_len)
            self._num_left, self._drain_bound, draining = self._workload.num_steps, 0, False
        elif draining and self._oracle.has_work():
            assert self._num_left > self._drain_bound, "the workload does not drain"
        self._num_left -= 1
        return draw_operations(self._rng, self._oracle, self._workload, draining=draining)
