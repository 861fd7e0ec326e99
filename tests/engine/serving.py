"""Shared by tests that serve requests with one small engine, from one place, from tasks and from threads."""

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from jaxserve import AsyncEngine, Engine, EngineConfig, RequestOutput, SamplingParams, Update
from tests import small_model

CONFIG = EngineConfig(**small_model.CAPACITIES)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = dataclasses.replace(LONG, max_tokens=5)
PATIENCE = 60  # seconds; only a defect waits that long


def reconfigure(engine: Engine, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    """Sets options that no program is compiled for: `max_waiting` and `debug_checks`."""
    for name, value in fields.items():
        monkeypatch.setattr({"max_waiting": engine.queue, "debug_checks": engine._loop}[name], name, value)


def num_free_pages(engine: Engine) -> int:
    return int(engine.driver.state.table.num_free)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def make_prompts(number: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [rng.integers(1, small_model.MODEL.vocab_size, size).tolist() for size in rng.integers(1, longest, number)]


def tokens_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in output.outputs]


def all_kinds_of_params() -> list[SamplingParams]:
    """Every sampling parameter, alone and together."""
    each = [
        {"temperature": 0},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"n": 3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": {5: 20.0, 6: 20.0}},
        {"allowed_token_ids": (10, 11, 12, 13)},
        {"bad_words": ("a", "the cat")},
        {"min_tokens": 9, "max_tokens": 12},
        {"stop": ("e", "at", "th")},
        {"stop": ("e",), "include_stop_str_in_output": True},
        {"stop": ([7], [9, 8])},
        {"stop_token_ids": tuple(range(40, 46))},
        {"logprobs": 3},
        {"logprobs": 0, "logprobs_mode": "processed"},
        {"prompt_logprobs": 2},
        {"truncate_prompt_tokens": 4},
        {"detokenize": False},
        {"skip_special_tokens": False, "ignore_eos": True},
        {"n": 2, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 1, "stop": ("s",), "min_tokens": 2},
    ]
    return [
        SamplingParams(**{"seed": index, "max_tokens": 10 + index % 7} | fields) for index, fields in enumerate(each)
    ]


def check_updates(updates: list[Update]) -> RequestOutput:
    """Checks the updates of one request; returns the result."""
    assert [update.output is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    output = updates[-1].output
    for completion in output.outputs:
        mine = [update for update in updates if update.index == completion.index]
        assert "".join(update.text for update in mine) == completion.text
        assert sum((update.token_ids for update in mine), ()) == completion.token_ids
    return output


def same(one: RequestOutput, other: RequestOutput) -> bool:
    """Returns whether two results are equal except for times and id."""
    return dataclasses.replace(one, request_id="", metrics=None) == dataclasses.replace(
        other, request_id="", metrics=None
    )


async def collect(engine: AsyncEngine, *args, **kwargs) -> list[Update]:
    return [update async for update in engine.stream(*args, **kwargs)]


class Gate:
    """Holds the engine thread before each step until it is opened; counts steps and ends."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.open = threading.Event()
        self.num_steps = 0
        self.ends: dict[str, list[str]] = {}  # reasons
        self._permits = threading.Semaphore(0)
        self._step = engine.step
        monkeypatch.setattr(engine, "step", self._gated)

    def let_through(self, number: int) -> None:
        for _ in range(number):
            self._permits.release()

    def _gated(self, max_steps: int | None = None) -> list[Update]:
        while not self.open.is_set() and not self._permits.acquire(timeout=0.005):
            pass
        updates = self._step(max_steps)
        self.num_steps += 1
        for update in updates:
            if update.output is not None:
                reason = update.output.outputs[0].finish_reason
                self.ends.setdefault(update.request_id, []).append(reason)
        return updates
