"""Nothing is compiled after warm-up (promise P1), and the guard that checks it."""

import contextlib
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.compile_guard import UnexpectedCompilation, forbid_compilation
from jaxserve.core.programs import Changes, programs
from jaxserve.core.scheduler import check_invariants, init_state
from tests import workload
from tests.workload import CONFIG, MODEL

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of the programs that XLA compiles in the context."""
    names = []

    def note(event: str, _: float, **attributes: str) -> None:
        if event == COMPILED:
            names.append(attributes.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


class Host:
    """Drives the two programs as the Engine does, and is told how many rows to submit and abort each time."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.programs = programs(MODEL, CONFIG)
        self.params = workload.make_params()
        self.state = init_state(MODEL, CONFIG)
        self.num_finished = 0

    def turn(self, num_new: int, num_steps: int, *, aborting: bool) -> None:
        """Submits, aborts one row, collects what has finished, runs some steps."""
        status, generation = (np.asarray(leaf) for leaf in (self.state.queue.status, self.state.queue.generation))
        requests = workload.crowd(int(self.rng.integers(2**31)), num_new)
        aborted = np.zeros(CONFIG.queue_size, bool)
        aborted[self.rng.integers(CONFIG.queue_size)] = aborting
        changes = Changes(
            submission=workload.submission_of(requests, CONFIG),
            collected=status >= 3,
            aborted=aborted,
            generation=generation,
        )
        self.num_finished += int((status >= 3).sum())
        self.state, _ = self.programs["update"](self.state, changes)
        self.state, _ = self.programs["run_steps"](self.params, self.state, np.int32(num_steps))


@pytest.fixture(scope="module")
def warm_host() -> Host:
    host = Host(seed=0)
    host.turn(2, 2, aborting=False)
    host.turn(2, 2, aborting=False)
    return host


def test_no_workload_compiles_anything_after_warm_up(warm_host):
    with compilations() as names:
        for index in range(120):
            num_new = int(warm_host.rng.integers(0, 4)) if index % 10 else CONFIG.queue_size
            warm_host.turn(num_new, int(warm_host.rng.integers(0, 20)), aborting=index % 3 == 0)
    check_invariants(warm_host.state)
    assert warm_host.num_finished > 100
    assert names == []


def test_new_weights_of_the_same_structure_compile_nothing(warm_host):
    others = [workload.make_params(seed=1), jax.device_get(workload.make_params(seed=2))]
    with compilations() as names:
        for params in others:
            warm_host.params = params
            warm_host.turn(3, 8, aborting=False)
    assert names == []


def test_another_state_of_the_same_configuration_compiles_nothing(warm_host):
    host = Host(seed=1)
    with compilations() as names:
        for num_new in (12, 0, 3):
            host.turn(num_new, 16, aborting=False)
    assert names == []


def test_a_python_number_in_place_of_an_array_does_compile(warm_host):
    """The control: the counter sees the compilation that a Python number causes."""
    with compilations() as names:
        warm_host.state, _ = warm_host.programs["run_steps"](warm_host.params, warm_host.state, 3)
    assert len(names) == 1
    assert "run_steps" in names[0]


def fresh_program():
    """A program that has not been compiled in this process."""
    return jax.jit(lambda x: 2 * x + 1)


def test_the_counter_counts_every_program_once():
    first, second, x = fresh_program(), fresh_program(), np.ones(3, np.float32)
    with compilations() as names:
        for _ in range(3):
            first(x)
            second(x)
    assert len(names) == 2


def test_the_guard_raises_at_the_offending_call():
    program, x, reached = fresh_program(), np.ones(3, np.float32), []
    with pytest.raises(UnexpectedCompilation, match="lambda"), forbid_compilation():
        reached.append("before")
        program(x)
        reached.append("after")
    assert reached == ["before"]


def test_the_guard_lets_compiled_programs_run():
    program, x = fresh_program(), np.ones(3, np.float32)
    program(x)
    with forbid_compilation():
        assert np.asarray(program(x))[0] == 3
        with pytest.raises(UnexpectedCompilation):
            program(np.ones(4, np.float32))
        with pytest.raises(UnexpectedCompilation):
            program(np.ones(3, np.int32))
        assert np.asarray(program(x))[0] == 3


def test_the_guard_sees_single_operations_too():
    with pytest.raises(UnexpectedCompilation), forbid_compilation():
        jnp.zeros((3, 1, 4, 1, 5, 9))


def test_the_guard_ends_where_it_ends_also_when_nested_and_after_an_error():
    with forbid_compilation():
        with forbid_compilation():
            pass
        with pytest.raises(UnexpectedCompilation):
            fresh_program()(np.ones(3, np.float32))
    assert fresh_program()(np.ones(3, np.float32))[0] == 3
    with pytest.raises(KeyError), forbid_compilation():
        raise KeyError
    assert fresh_program()(np.ones(3, np.float32))[0] == 3


def test_the_guard_leaves_other_threads_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(fresh_program()(np.ones(3, np.float32))[0]))
    with forbid_compilation():
        thread.start()
        thread.join()
    assert results == [3]
