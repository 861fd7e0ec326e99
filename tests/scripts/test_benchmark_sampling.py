"""The benchmark of sampling parameters in a tiny form."""

import json

import benchmark_sampling
from absl import flags
from benchmark_sampling import FEATURES

from jaxserve import SamplingParams
from jaxserve.request import by_group


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    benchmark_sampling.define_flags(values)
    _, *others = values(["benchmark_sampling", *arguments])
    return benchmark_sampling.main(["benchmark_sampling", *others], values)


def test_every_feature_has_a_record_and_a_line(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    sizes = ("--rows=2", "--vocab_size=300", "--sequence_length=24")
    assert run(*sizes, "--repeats=1", "--sampler=plain", f"--json={path}") == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["feature"] for record in records] == ["argmax and log-sum-exp", "nothing asked", *FEATURES]
    assert all(record["median_ms"] > 0 and record["vocab_size"] == 300 and record["commit"] for record in records)
    assert {record["sampler"] for record in records} == {"plain"} and records[1]["added_ms"] == 0
    printed = capsys.readouterr().out
    assert all(feature in printed for feature in FEATURES) and "milliseconds per step" in printed


def test_every_parameter_that_changes_logits_or_draws_is_among_the_features():
    groups = by_group(SamplingParams)
    expected = {item.name for group in ("What changes the logits", "How a token is drawn") for item in groups[group]}
    assert len(expected) > 10
    assert expected - {"seed", "n"} <= {name for fields in FEATURES.values() for name in fields}


def test_an_unexpected_argument_is_refused_in_one_sentence(capsys):
    assert run("x") == 1
    assert capsys.readouterr().err == "error: unexpected argument 'x': this script takes flags only\n"
