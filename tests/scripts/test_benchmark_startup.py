"""The startup benchmark: its arithmetic, the settings of a child, and one real start of each kind."""

import json
import os

import benchmark_startup
import pytest
from absl import flags
from benchmark_startup import PHASES, parse_options, spawn, summarize

from tests.small_model import TINY_CONFIG


def values_of(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    benchmark_startup.define_flags(values)
    values(["benchmark_startup", *arguments])
    return values


def run(*arguments: str) -> int:
    return benchmark_startup.main(["benchmark_startup"], values_of(*arguments))


def told(*ends: float, rss: int = 10**6) -> dict:
    stamps = dict(zip(PHASES, ends, strict=True))
    return {"stamps": stamps, "backend": "reference", "programs": 9, "programs_from_cache": 4, "peak_rss_bytes": rss}


def test_phases_follow_each_other_and_medians_are_taken_of_each():
    runs = [told(0.1, 0.6, 1.1, 2, 4, 5), told(0.1, 0.3, 1.1, 2, 9, 9.5), told(0.2, 0.5, 1.5, 2, 3, 3.5, rss=3 * 10**6)]
    found = summarize(runs)
    assert [found[f"{phase}_s"] for phase in PHASES] == [0.1, 0.3, 0.8, 0.9, 2, 0.5]
    assert (found["import_s"], found["total_s"], found["total_min_s"], found["total_max_s"]) == (1, 5, 3.5, 9.5)
    assert (found["peak_rss_mb"], found["programs"], found["programs_from_cache"]) == (1, 9, 4)


@pytest.mark.slow
def test_starts_are_measured_and_find_the_caches_that_they_should(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_startup, "STARTS", ("cold", "cached"))  # "first" is "cold" for the plain backend
    out = tmp_path / "out.jsonl"
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY_CONFIG))
    small = [
        f"--model={model}",
        "--max_slots=2",
        "--max_model_len=32",
        "--chunk_size=8",
        "--attention_backend=reference",
    ]
    assert run(*small, "--repeats=1", "--prompt_len=3", f"--json={out}") == 0, capsys.readouterr().err
    records = {record["start"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert list(records) == ["cold", "cached"]
    for record in records.values():
        phases = [record[f"{phase}_s"] for phase in PHASES]
        assert min(phases) >= 0 and sum(phases) == pytest.approx(record["total_s"], rel=1e-2)
        assert record["config"]["max_slots"] == 2 and record["backend"] == "reference" and record["programs"] > 2
    assert records["cold"]["programs_from_cache"] == 0
    assert records["cached"]["programs_from_cache"] > 0
    assert "total" in capsys.readouterr().out


def test_each_kind_of_start_has_the_caches_that_its_name_says(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark_startup, "spawn", lambda _, environment, cache: seen.append((environment, cache)))
    assert [start for start, _ in benchmark_startup.starts(None)] == ["first", "cold", "cached"]  # type: ignore[arg-type]
    (first, programs), (cold, others), (cached, kept) = seen
    assert first == cold == cached  # native kernels: the first start builds them for all
    assert programs != others == kept  # compiled programs: the third start finds those of the second


def test_a_start_that_fails_or_hangs_is_an_error_that_says_why(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    monkeypatch.setattr(benchmark_startup, "_CHILD", child)
    options = parse_options(values_of("--timeout_s=1"))
    child.write_text("import sys; sys.exit('no room')")
    with pytest.raises(RuntimeError, match="a start failed: no room"):
        spawn(options, {}, "")
    child.write_text("import time; time.sleep(9)")
    with pytest.raises(RuntimeError, match="more than --timeout_s=1"):
        spawn(options, {}, "")


def test_a_child_is_told_the_engine_and_where_its_caches_are(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    monkeypatch.setattr(benchmark_startup, "_CHILD", child)
    child.write_text(
        "import json, os, sys, time\n"
        f"stamps = dict.fromkeys({PHASES!r}, time.time())\n"
        "told = json.loads(sys.argv[1]) | {'home': os.environ['XDG_CACHE_HOME']}\n"
        "print(json.dumps({'stamps': stamps, 'told': told}))"
    )
    options = parse_options(values_of("--max_slots=3", "--prompt_len=5", "--model=configs/models/llama-135m.json"))
    answer = spawn(options, {"XDG_CACHE_HOME": str(tmp_path)}, "here")
    settings = answer["told"]
    assert (settings["config"]["max_slots"], settings["prompt_len"], settings["load_format"]) == (3, 5, "dummy")
    assert (settings["compilation_cache_dir"], settings["home"]) == ("here", str(tmp_path))
    assert os.path.isabs(settings["model"]) and all(0 < answer["stamps"][phase] < 60 for phase in PHASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compilation_cache_dir=x"], "--compilation_cache_dir has no effect"),
        (["--prompt_len=31", "--max_model_len=32"], "--prompt_len=31 leaves no room in sequences of 32"),
        (["--model=nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_flags_get_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # a library may have something to say as it is imported
    assert error.startswith("error: ") and message in error and "Traceback" not in error
