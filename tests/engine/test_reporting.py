"""Totals, latencies, load, and the cost of a token in calls and reads."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import pytest

from jaxserve import AsyncEngine, Engine, SamplingParams
from tests.engine.serving import (
    CONFIG,
    LONG,
    PATIENCE,
    SHORT,
    make_prompts,
    tokens_of,
)


def test_device_calls_and_host_reads_are_counted_and_few_per_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: collections.Counter[str] = collections.Counter()

    def counting(name: str, function: Callable) -> Callable:
        def call(*args):
            counted[name] += 1
            return function(*args)

        return call

    engine.reset_stats()
    programs = engine.driver.programs
    counters = {name: counting(name, getattr(programs, name)) for name in ("update", "run_steps")}
    monkeypatch.setattr(engine.driver, "programs", dataclasses.replace(programs, **counters))
    monkeypatch.setattr(jax, "device_get", counting("device_get", jax.device_get))
    monkeypatch.setattr(jax, "block_until_ready", counting("block_until_ready", jax.block_until_ready))
    params = dataclasses.replace(LONG, max_tokens=40, stop="no such text")
    engine.generate([[index + 1] * 4 for index in range(4)], params)
    while engine.has_work:
        engine.step()
    stats = engine.stats
    assert stats.num_device_calls == counted["update"] + counted["run_steps"]
    assert stats.num_host_reads == counted["device_get"] == counted["run_steps"] and not counted["block_until_ready"]
    assert counted["update"] <= 2
    assert stats.num_generated_tokens == 160
    # 8 steps per call and 4 samples, prefill and the last, empty call included: 1 read for 20 tokens.
    assert stats.num_host_reads <= 8 and stats.num_device_calls <= 10


def test_latencies_and_load_are_those_of_the_requests(engine: Engine) -> None:
    engine.reset_stats()
    params = [dataclasses.replace(LONG, max_tokens=2 + index) for index in range(10)]
    params.append(SamplingParams(n=2, max_tokens=7, ignore_eos=True))
    for prompt, wanted in zip(make_prompts(11), params, strict=True):
        engine.add_request(prompt, wanted)
    outputs, loads = [], []
    while engine.has_work:
        outputs += [update.output for update in engine.step(2) if update.output is not None]
        loads.append((engine.stats.num_running, engine.stats.num_waiting, engine.stats.num_used_pages))
    latencies, metrics = engine.stats.latencies, [output.metrics for output in outputs]
    num_tokens = [len(tokens) for output in outputs for tokens in tokens_of(output)]
    assert latencies.queue.count == latencies.time_to_first_token.count == latencies.end_to_end.count == 11
    assert latencies.inter_token.count == sum(num_tokens) - 12
    first = sum(one.first_token_time - one.arrival_time for one in metrics)
    end_to_end = sum(one.finish_time - one.arrival_time for one in metrics)
    assert latencies.time_to_first_token.sum == pytest.approx(first, rel=0.2)
    assert latencies.end_to_end.sum == pytest.approx(end_to_end, rel=0.2)
    assert 0 < latencies.queue.sum < latencies.time_to_first_token.sum
    assert latencies.queue.quantile(0.1) < latencies.queue.quantile(0.9) <= latencies.end_to_end.quantile(0.99)
    assert loads[0][1] == 11 and max(running for running, _, _ in loads) == CONFIG.max_slots
    assert loads[-1] == (0, 0, 0) and max(pages for _, _, pages in loads) <= engine.stats.peak_pages
    engine.reset_stats()
    assert engine.stats.latencies.queue.count == engine.stats.num_host_reads == 0


def test_tokens_that_come_together_share_the_time_since_the_last_and_the_sum_is_exact(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reset_stats()
    times = []
    note_tokens = engine.reporter.note_tokens

    def noting(sequence, num_tokens: int, now: float) -> None:
        times.append(now)
        note_tokens(sequence, num_tokens, now)

    monkeypatch.setattr(engine.reporter, "note_tokens", noting)
    engine.generate([[1, 2]], LONG)
    latencies = engine.stats.latencies
    assert latencies.inter_token.count == 59
    assert latencies.inter_token.sum == pytest.approx(times[-1] - times[0])


def test_stats_are_a_record_that_does_not_change(engine: Engine) -> None:
    engine.reset_stats()
    with AsyncEngine(engine) as asynchronous:
        asynchronous.submit([1], SHORT).result(PATIENCE)
        before = asynchronous.stats()
        copy = before.snapshot()
        assert before.num_generated_tokens == 5 and before.latencies.end_to_end.count == 1
        asynchronous.submit([1], SHORT).result(PATIENCE)
        assert before == copy and asynchronous.stats().num_generated_tokens == 10
