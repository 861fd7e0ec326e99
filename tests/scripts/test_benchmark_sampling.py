"""The benchmark of sampling parameters in a tiny form, in a process of its own: scripts' flags share one set of names."""

import json
import os
import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "benchmark_sampling.py"
FEATURES = re.findall(r'^    "([a-z_, ]+)": \{', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_every_feature_has_a_record(tmp_path):
    path = tmp_path / "out.jsonl"
    done = run("--rows=2", "--vocab_size=300", "--sequence_length=24", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["feature"] for record in records] == ["argmax and log-sum-exp", "nothing asked", *FEATURES]
    assert len(FEATURES) > 10
    assert all(record["median_ms"] > 0 and record["vocab_size"] == 300 for record in records)
    assert all(feature in done.stdout for feature in FEATURES)


def test_an_unexpected_argument_is_refused_in_one_sentence():
    done = run("x")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: unexpected argument 'x': there are only flags"
