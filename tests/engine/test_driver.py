"""The device's side of an engine: the arrays that it frees, the size of its updates, the life of its programs."""

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.programs import programs
from tests import small_model
from tests.engine.serving import CONFIG, LONG, SHORT

WIDE = dataclasses.replace(CONFIG, max_slots=8, max_queue=24, num_pages=96)


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, note: Callable[..., None]) -> None:
    """Calls `note` with the arguments of a program before each call of it."""
    program = getattr(engine.driver.programs, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return program(*args, **kwargs)

    monkeypatch.setattr(engine.driver, "programs", dataclasses.replace(engine.driver.programs, **{name: noting}))


def failing(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "moment", ["while a call is read", "before a call takes the state", "when a call took the state"]
)
def test_after_an_interrupt_the_old_state_is_let_go_before_a_new_one_is_made(engine, monkeypatch, moment) -> None:
    """With a pool of most of the device's memory there is no room for two."""
    (expected,) = engine.generate([[1, 2]], SHORT)
    programs, states, alive = engine.driver.programs, [], []

    def init(**kwargs: Any) -> Any:
        alive.extend(not leaf.is_deleted() for leaf in jax.tree.leaves(states))
        return programs.init(**kwargs)

    def run_steps(leaves: Any, state: Any, num_steps: Any) -> Any:
        states.append(state)
        if moment == "before a call takes the state":
            raise KeyboardInterrupt
        result = programs.run_steps(leaves, state, num_steps)
        if moment == "when a call took the state":
            raise KeyboardInterrupt
        states.append(result[0])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(engine.driver, "programs", dataclasses.replace(programs, init=init, run_steps=run_steps))
        if moment == "while a call is read":
            patch.setattr(engine.driver, "read", failing)
        engine.add_request([1, 2], LONG)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):
                engine.step(1)
    assert alive and not any(alive)
    assert not engine.has_work
    assert engine.generate([[1, 2]], SHORT)[0].outputs == expected.outputs


def test_an_update_carries_what_changed(monkeypatch) -> None:
    engine = Engine(small_model.make_params(), small_model.MODEL, WIDE)
    engine.warm_up()
    row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.queue.intake.submission([], 1)))
    mask_bytes = 6 * WIDE.queue_size  # collected, aborted: 1 each; generation: 4
    sent: list[tuple[int, int]] = []  # rows submitted, bytes

    def note(_: Any, changes: Any) -> None:
        num_rows = 0 if changes.submission is None else int(np.sum(changes.submission.valid))
        sent.append((num_rows, sum(leaf.nbytes for leaf in jax.tree.leaves(changes))))

    watch(engine, monkeypatch, "update", note)
    with forbid_compilation():
        for number in (1, 4, 5, 8):
            engine.generate([[1, 2, 3]] * number, SHORT)
            while engine.has_work:
                engine.step()
        engine.add_request([1], LONG, id="to be aborted")
        engine.step(1)
        engine.abort("to be aborted")
        while engine.has_work:
            engine.step(1)
    widths = {0: 0, 1: 4, 4: 4, 5: 8, 8: 8}
    assert {number for number, _ in sent} == set(widths)
    for number, num_bytes in sent:
        assert num_bytes == mask_bytes + widths[number] * row_bytes


def double(aux: Any, logits: jax.Array, context: Any, *, factor: float) -> tuple[Any, jax.Array]:
    return aux, logits * factor


def test_a_program_with_a_logits_fn_goes_with_its_engine() -> None:
    logits_fn = functools.partial(double, factor=2.0)
    engine = Engine(small_model.make_params(), small_model.MODEL, CONFIG, logits_fn=logits_fn)
    engine.generate([[1, 2]], SamplingParams(max_tokens=2))
    gone = weakref.ref(logits_fn)
    del engine, logits_fn
    gc.collect()
    assert gone() is None


def test_programs_with_a_logits_fn_are_the_callers_and_those_without_are_shared() -> None:
    logits_fn = functools.partial(double, factor=2.0)
    made, gone = programs(small_model.MODEL, CONFIG, logits_fn), weakref.ref(logits_fn)
    assert made.keys() == programs(small_model.MODEL, CONFIG).keys()
    del made, logits_fn
    gc.collect()
    assert gone() is None
    assert programs(small_model.MODEL, CONFIG) is programs(small_model.MODEL, CONFIG)
    one, other = (Engine(small_model.make_params(seed), small_model.MODEL, CONFIG) for seed in (0, 1))
    assert one.driver.programs is other.driver.programs
