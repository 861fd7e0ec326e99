"""Histograms, totals and the load of an engine."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.scheduler import Status
from jaxserve.engine.stats import BUCKETS, EngineStats, Histogram

durations = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=60)


def filled(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    return histogram


def test_buckets_are_five_to_a_factor_of_ten_from_a_tenth_of_a_millisecond_to_a_thousand_seconds():
    assert (BUCKETS[0], BUCKETS[5], BUCKETS[20], BUCKETS[-1]) == (1e-4, 1e-3, 1.0, 1e3)
    assert list(BUCKETS) == sorted(set(BUCKETS))


@given(durations)
def test_each_duration_is_in_the_first_bucket_whose_bound_it_does_not_exceed(values):
    histogram = filled(values)
    at_most = np.cumsum(histogram.counts)
    for bound, number in zip(BUCKETS, at_most, strict=False):
        assert number == sum(value <= bound for value in values)
    assert histogram.count == at_most[-1] == len(values)
    assert histogram.sum == pytest.approx(sum(values)) and histogram.mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize("bound", BUCKETS[::7])
def test_a_bound_belongs_to_its_bucket_and_what_is_above_it_to_the_next(bound):
    index = BUCKETS.index(bound)
    assert filled([bound]).counts[index] == 1
    assert filled([math.nextafter(bound, math.inf)]).counts[index + 1] == 1


@given(durations, st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, q):
    true = sorted(values)[max(math.ceil(q * len(values)) - 1, 0)]
    index = next((i for i, bound in enumerate(BUCKETS) if true <= bound), None)
    estimate = filled(values).quantile(q)
    if index is None:
        assert estimate == BUCKETS[-1]
    else:
        assert (BUCKETS[index - 1] if index else 0) <= estimate <= BUCKETS[index]


def test_quantiles_of_many_durations_are_near_and_never_fall():
    values = np.random.default_rng(0).lognormal(-3, 1, 20000)
    histogram = filled(values.tolist())
    estimates = [histogram.quantile(q) for q in (0.01, 0.25, 0.5, 0.9, 0.99)]
    np.testing.assert_allclose(estimates, np.quantile(values, (0.01, 0.25, 0.5, 0.9, 0.99)), rtol=0.1)
    assert estimates == sorted(estimates)


def test_a_duration_counted_several_times_is_that_many_durations():
    histogram = Histogram()
    histogram.observe(0.25, 4)
    histogram.observe(0.5, 0)
    assert histogram == filled([0.25] * 4)


def test_an_empty_histogram_has_no_mean_and_no_quantile_and_a_share_out_of_range_is_refused():
    assert math.isnan(Histogram().mean) and math.isnan(Histogram().quantile(0.5))
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            filled([1.0]).quantile(q)


def outputs(num_steps: int, **steps) -> types.SimpleNamespace:
    """As `run_steps` returns them, for 2 slots, 3 rows and room for 4 steps; what lies beyond `num_steps` is stale."""
    fields = {
        "row_id": [[0, 1], [0, 3], [0, 2], [0, 0]],
        "num_new": [[5, 1], [1, 0], [1, 7], [9, 9]],
        "sampled": [[False, True], [True, False], [True, True], [True, True]],
        "num_preempted": [0, 1, 0, 9],
        "num_free_pages": [6, 3, 5, 0],
    } | steps
    return types.SimpleNamespace(
        steps=types.SimpleNamespace(**{name: np.array(value) for name, value in fields.items()}),
        num_steps=np.int32(num_steps),
        status=np.array([Status.RUNNING, Status.STOP, Status.WAITING]),
        num_free_pages=np.int32(7),
    )


def test_totals_are_those_of_the_steps_that_ran_and_the_load_is_that_after_the_last():
    stats = EngineStats(max_slots=2, num_pages=10)
    stats.count(outputs(3))
    assert (stats.num_steps, stats.num_slot_steps, stats.num_computed_tokens) == (3, 5, 15)
    assert (stats.num_generated_tokens, stats.num_preemptions, stats.peak_pages) == (4, 1, 7)
    assert (stats.num_running, stats.num_used_pages) == (1, 3)
    assert stats.mean_occupancy == 5 / 6
    stats.count(outputs(0))
    assert (stats.num_steps, stats.peak_pages) == (3, 7), "a call without steps adds nothing"
    stats.count(outputs(1))
    assert (stats.num_steps, stats.num_computed_tokens) == (4, 21)


def test_a_snapshot_does_not_change_and_is_plain_numbers():
    stats = EngineStats(max_slots=2, num_pages=10)
    stats.latencies.queue.observe(0.5)
    snapshot = stats.snapshot()
    before = json.dumps(dataclasses.asdict(snapshot))
    stats.count(outputs(3))
    for field in dataclasses.fields(stats.latencies):
        getattr(stats.latencies, field.name).observe(1.0)
    assert json.dumps(dataclasses.asdict(snapshot)) == before != json.dumps(dataclasses.asdict(stats))
    assert snapshot.latencies.queue.count == 1


def test_rates_of_an_engine_that_did_nothing_are_zero():
    stats = EngineStats(max_slots=2, num_pages=10)
    assert stats.tokens_per_second == stats.mean_occupancy == 0
    assert stats.summary().startswith("0 requests, 0 prompt + 0 generated tokens, 0.0 tokens/s")
