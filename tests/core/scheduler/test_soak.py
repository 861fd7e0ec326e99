"""The soak of the scheduler, on one configuration and few steps."""

import functools

import pytest

from tests.core.scheduler import soak, traces

NAME = "minimal pool"


@pytest.fixture
def one_short_trace(monkeypatch):
    monkeypatch.setattr(traces, "CONFIGS", {NAME: traces.CONFIGS[NAME]})
    monkeypatch.setattr(traces, "Device", functools.partial(traces.Device, compiler_options=traces.FAST_COMPILE))
    monkeypatch.setattr(soak, "STEPS_PER_TRACE", 300)


def test_traces_follow_each_other_until_there_are_enough_steps(one_short_trace, monkeypatch):
    seeds, run_trace = [], traces.run_trace

    def recorded(device, *, seed, num_steps):
        seeds.append(seed)
        return run_trace(device, seed=seed, num_steps=num_steps)

    monkeypatch.setattr(traces, "run_trace", recorded)
    events = soak.soak(1200, first_seed=7, seconds=600)
    assert events["steps"] >= 1200 and events["admitted"] > 0
    assert len(seeds) >= 2 and seeds == list(range(7, 7 + len(seeds)))


def test_a_failure_says_how_to_repeat_it(one_short_trace, monkeypatch):
    def fail(device, *, seed, num_steps):
        raise AssertionError("a difference")

    monkeypatch.setattr(traces, "run_trace", fail)
    with pytest.raises(RuntimeError, match="configuration 'minimal pool': a difference; repeat it with --seed=3"):
        soak.soak(1, first_seed=3, seconds=600)
