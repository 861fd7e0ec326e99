"""The serving benchmark: arrivals, times with a stub engine and clock, and its report."""

import collections
import dataclasses
import math
import types

import benchmark_serving
import numpy as np
import pytest
from absl import flags
from lib.serving_load import (
    Served,
    Trace,
    arrival_times,
    is_above_capacity,
    offer,
    parse_slos,
    queue_growth,
    summarize,
)

from jaxserve import QueueFullError, SamplingParams


class Clock:
    """A clock that moves only when the engine works or the benchmark sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class OneAtATime:
    """An engine of one slot; each call takes a second and brings a token of the request at the head."""

    def __init__(self, clock: Clock, max_waiting: int = 100) -> None:
        self.clock, self.max_waiting = clock, max_waiting
        self.queue: collections.deque[list] = collections.deque()
        self.stats = types.SimpleNamespace(num_waiting=0, num_steps=0, num_preemptions=0, mean_occupancy=1.0)
        self.stats.snapshot = lambda: self.stats
        self.has_work = False

    def reset_stats(self) -> None:
        self.stats.num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.queue)

    def add_request(self, prompt, params: SamplingParams, *, id: str) -> None:
        if len(self.queue) > self.max_waiting:
            raise QueueFullError("full")
        self.queue.append([id, params.max_tokens])

    def step(self, max_steps: int):
        assert max_steps == 1
        self.clock.now += 1
        self.stats.num_steps += 1
        self.stats.num_waiting = max(len(self.queue) - 1, 0)
        head = self.queue[0]
        head[1] -= 1
        if not head[1]:
            self.queue.popleft()
        return [types.SimpleNamespace(request_id=head[0], token_ids=(7,), output=None if head[1] else "whole")]


def serve(lengths, due, **options) -> Trace:
    clock = Clock()
    params = [SamplingParams(max_tokens=length) for length in lengths]
    engine = OneAtATime(clock, **options)
    return offer(engine, [[1]] * len(due), params, due, steps_per_call=1, clock=clock, sleep=clock.sleep)


def test_times_count_from_when_a_request_was_due_though_the_engine_was_busy_then():
    trace = serve([3, 2, 1], [0.5, 1.0, 9.25])
    first, second, third = trace.served
    # From 0.5 on the first is served; the second, due at 1.0, can be handed over at 1.5 and is served from 3.5 on.
    assert (first.due, first.handed_over, first.token_times, first.finish) == (0.5, 0.5, [1.5, 2.5, 3.5], 3.5)
    assert (second.handed_over, second.token_times) == (1.5, [4.5, 5.5])
    assert (first.ttft_ms, first.tpot_ms, first.e2e_ms, first.itl_ms) == (1000, 1000, 3000, [1000, 1000])
    assert (second.ttft_ms, second.e2e_ms) == (3500, 4500)
    assert (third.token_times, third.tpot_ms, third.itl_ms) == ([10.25], None, [])
    assert trace.waiting == [(1.5, 0), (2.5, 1), (3.5, 1), (4.5, 0), (5.5, 0), (10.25, 0)]
    assert trace.num_steps == 6


def test_the_summary_is_that_of_the_requests():
    found = summarize(serve([3, 2, 1], [0.5, 1.0, 9.25]), 0.3, {"ttft_ms": 1200, "tpot_ms": 1000})
    assert (found["seconds"], found["num_finished"], found["num_refused"], found["steps"]) == (10.25, 3, 0, 6)
    assert found["requests_per_s"] == pytest.approx(3 / 10.25, rel=1e-3)
    assert found["output_tokens_per_s"] == pytest.approx(6 / 10.25, rel=1e-3)
    assert found["ttft_ms"] == {"mean": 1833, "median": 1000, "p90": 3000, "p99": 3450}
    assert found["e2e_ms"]["mean"] == pytest.approx((3000 + 4500 + 1000) / 3, rel=1e-3)
    assert found["tpot_ms"]["median"] == found["itl_ms"]["median"] == 1000
    assert found["late_ms"]["mean"] == pytest.approx(500 / 3, rel=1e-3)
    assert found["goodput_requests_per_s"] == pytest.approx(2 / 10.25, rel=1e-3)  # the second waited too long
    assert found["share_within_slos"] == pytest.approx(2 / 3, rel=1e-3)
    assert summarize(serve([1], [0.0]), 1, {})["goodput_requests_per_s"] is None


def test_a_token_rate_that_is_too_low_is_no_goodput_either():
    slow = Trace([Served(0, 0, False, [1.0, 3.0, 5.0], 5.0), Served(0, 0, False, [1.0, 2.0], 2.0)], [])
    assert summarize(slow, 1, {"tpot_ms": 1500})["share_within_slos"] == 0.5
    assert summarize(slow, 1, {"e2e_ms": 1999})["share_within_slos"] == 0


def test_refused_requests_are_counted_and_have_no_latency():
    trace = serve([4] * 4, [0.0, 0.1, 0.2, 0.3], max_waiting=1)
    assert [one.refused for one in trace.served] == [False, False, True, True]
    found = summarize(trace, 10, {"e2e_ms": 1e6})
    assert (found["num_finished"], found["num_refused"], found["share_within_slos"]) == (2, 2, 0.5)


@pytest.mark.parametrize(("tokens", "growth", "above"), [(1, 0, False), (2, 0, False), (4, 0.5, True), (8, 0.75, True)])
def test_a_rate_above_capacity_is_told_by_the_queue(tokens, growth, above):
    due = [2.0 * index for index in range(60)]  # every 2 s; the engine needs `tokens` seconds for each
    trace = serve([tokens] * len(due), due)
    assert queue_growth(trace, 0.5) == pytest.approx(growth, abs=0.06)
    assert is_above_capacity(trace, 0.5) is above


def test_a_burst_that_is_worked_off_is_no_growth_and_one_moment_tells_nothing():
    due = [0.0] * 10 + [10.0 + 2 * index for index in range(50)]
    assert is_above_capacity(serve([1] * len(due), due), len(due) / due[-1]) is False
    assert is_above_capacity(serve([1] * 5, [0.0] * 5), math.inf) is None


def test_arrivals_have_the_rate_and_the_variation_of_their_burstiness():
    for burstiness in (0.25, 1.0, 4.0):
        times = np.array(arrival_times(5, burstiness, 20_000, np.random.default_rng(1)))
        gaps = np.diff(times)
        assert times[-1] == pytest.approx(4000) and (gaps >= 0).all()
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_times(math.inf, 1.0, 3, np.random.default_rng(1)) == [0, 0, 0]
    slow, fast = (arrival_times(rate, 0.5, 9, np.random.default_rng(3)) for rate in (1, 2))
    assert slow == pytest.approx([2 * time for time in fast])


def test_bounds_are_read_and_nonsense_is_refused():
    assert parse_slos("ttft_ms:500,tpot_ms:12.5") == {"ttft_ms": 500, "tpot_ms": 12.5} and parse_slos("") == {}
    for text in ("ttft:500", "ttft_ms", "ttft_ms:-1", "ttft_ms:x", "ttft_ms:1,", "ttft_ms:nan"):
        with pytest.raises(ValueError, match="--slo: "):
            parse_slos(text)
    with pytest.raises(ValueError, match="tpot_ms is there twice"):
        parse_slos("tpot_ms:1,tpot_ms:2")


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    benchmark_serving.define_flags(values)
    values(["benchmark_serving", *arguments])
    return benchmark_serving.main(["benchmark_serving"], values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates=0"], "--rates: '0' must be a number above 0"),
        (["--rates="], "--rates is empty"),
        (["--burstiness=0"], "--burstiness=0.0 must lie in"),
        (["--slo=ttft:1"], "--slo: 'ttft:1' must be one of"),
        (["--timeline=a.html"], "there are 4 --rates: give one"),
        (["--max_model_len=20"], "max_model_len=20 is below the"),
        (["--steps_per_call=4", "--max_steps_per_call=2"], "max_steps_per_call=2 is below the 4"),
        (["--plot=a.gif"], "must be a file that ends in .png"),
    ],
)
def test_bad_flags_get_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # a library may have something to say as it is imported
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_request_without_an_end_is_not_counted():
    trace = Trace([Served(0.0, 0.0, False, [1.0], None), Served(0.0, 0.0, False, [2.0], 2.0)], [])
    assert summarize(dataclasses.replace(trace), 1, {})["num_finished"] == 1
