"""Tiny runs of the benchmarks of latency and serving, whose engines are equal, so that programs are compiled once."""

import json
import pathlib
from typing import Any

import benchmark_latency
import benchmark_serving
import jax
import pytest
from absl import flags
from lib import machine_rates

ENGINE = ["--max_slots=2", "--chunk_size=16", "--attention_backend=reference", "--compilation_cache_dir="]


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is twice as good in the second measurement."""
    rates = iter([0.5e9, 1e9])
    matmul = {"way": "known", "flops_per_s": 1e9}
    measure = lambda dtypes: {"matmul": matmul, "read": {"way": "known", "bytes_per_s": next(rates)}}  # noqa: E731
    monkeypatch.setattr(machine_rates, "measure", measure)


def run(benchmark: Any, folder: pathlib.Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs a benchmark with a plot and returns its records."""
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values([benchmark.__name__, *ENGINE, *arguments, f"--json={folder}/out.jsonl", f"--plot={folder}/out.png"])
    assert benchmark.main([benchmark.__name__], values) == 0
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("known_peaks")
def test_the_benchmark_of_latency_measures_every_case(tmp_path, capsys):
    cases = ["--batch_sizes=1,2", "--input_lens=5", "--output_lens=3,4"]
    records = run(benchmark_latency, tmp_path, *cases, "--repeats=2")
    sizes = [(record["batch_size"], record["input_len"], record["output_len"]) for record in records]
    assert sizes == [(1, 5, 3), (1, 5, 4), (2, 5, 3), (2, 5, 4)]
    for record in records:
        assert 0 < record["ttft_ms"]["median"] < record["batch_ms"]["p99"]
        assert record["engine"]["max_slots"] == 2 and record["engine"]["max_model_len"] == 9
        assert (record["read_bytes_per_s"], record["jax"]) == (1e9, jax.__version__)
        single = record["batch_size"] == 1
        assert (record["share_of_limit"] is not None) == single
        if single:
            assert record["limit_ms_per_token"] == pytest.approx(record["weight_bytes"] / 1e6, rel=1e-3)
    assert "ms per token" in capsys.readouterr().out


def test_the_benchmark_of_serving_serves_every_rate_and_records_it(tmp_path, capsys):
    prompts = ["--prompt_lengths=fixed", "--shortest_prompt=5", "--longest_prompt=5"]
    outputs = ["--output_lengths=bimodal", "--shortest_output=2", "--longest_output=4", "--num_requests=12"]
    load = ["--rates=200,inf", "--slo=e2e_ms:1e7", "--burstiness=0.5"]
    records = run(benchmark_serving, tmp_path, *prompts, *outputs, *load)
    assert [record["rate"] for record in records] == [200, "inf"]
    for record in records:
        assert (record["num_finished"], record["share_within_slos"], record["burstiness"]) == (12, 1, 0.5)
        assert record["engine"]["max_slots"] == 2 and record["engine"]["max_waiting"] is None
        assert record["engine"]["max_model_len"] == 9  # of the longest request
        assert 0 < record["ttft_ms"]["median"] <= record["ttft_ms"]["p99"] <= record["e2e_ms"]["p99"]
        assert record["device"] and record["method"].startswith("open load")
    assert "TTFT median" in capsys.readouterr().out
