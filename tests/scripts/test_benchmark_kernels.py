"""The kernels' benchmark: its records, its refusals, and the arithmetic behind its figures."""

import csv
import dataclasses
import json
import pathlib

import benchmark_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from kernel_bench import cases as kernel_cases
from kernel_bench import contenders as kernel_contenders
from kernel_bench.cases import Case
from kernel_bench.options import define_flags, parse_options
from lib import timing as kernel_timing
from lib.peaks import Peaks

from jaxserve import DEMO_MODEL
from pallas_kernels.backend import resolve_backend
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="written for CPU")

TINY = ["--shapes=llama-135m", "--batch=3", "--context=40", "--repeats=2", "--cache_mb=0"]
GIBIBYTE = 2**30
MODEL = pathlib.Path(DEMO_MODEL)
PEAKS = Peaks(2e10, 3e10, dict.fromkeys(["float32", "bfloat16", "float16"], 1e11))


@pytest.fixture
def known_peaks(monkeypatch):
    """Saves the time of measuring them."""
    monkeypatch.setattr(benchmark_kernels, "measure_peaks", lambda *_, **__: PEAKS)


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    define_flags(values)
    values(["benchmark_kernels", *arguments])
    return benchmark_kernels.main(["benchmark_kernels"], values)


def options(*arguments: str):
    values = flags.FlagValues()
    define_flags(values)
    values(["benchmark_kernels", *arguments])
    return parse_options(values)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_measurement_is_recorded_with_parameters_peaks_and_shares(tmp_path, capsys):
    paths = [tmp_path / "a.jsonl", tmp_path / "a.csv"]
    assert run("--op=all", *TINY, f"--json={paths[0]}", f"--csv={paths[1]}") == 0
    records = read(paths[0])
    timed = {(r["op"], r["contender"]): r for r in records if r["status"] == "timed"}
    assert {("decode", "reference"), ("chunk", "reference"), ("rotary_write", "reference")} <= timed.keys()
    record = timed["decode", "reference"]
    assert (record["shape"], record["dtype"], record["batch"], record["context"]) == ("llama-135m", "bfloat16", 3, 40)
    assert (record["page_size"], record["num_heads"], record["num_kv_heads"], record["head_dim"]) == (32, 9, 3, 64)
    assert record["platform"] == "cpu" and record["jax"] == jax.__version__
    for name in ("device", "jaxlib", "python", "commit", "date", "method"):
        assert record[name]
    keys, queries = 2 * 3 * 40 * 3 * 64 * 2, 3 * 9 * 64 * 4
    assert record["bytes"] == keys + 2 * queries + 3 * 2 * 4
    assert record["flops"] == 4 * 3 * 40 * 9 * 64
    assert 0 < record["min_us"] <= record["median_us"] <= record["p90_us"]
    assert record["bytes_per_s"] == pytest.approx(record["bytes"] / record["median_us"] * 1e6, rel=1e-3)
    assert record["share_of_copy_bandwidth"] == pytest.approx(
        record["bytes_per_s"] / record["copy_bytes_per_s"], rel=1e-3
    )
    assert record["share_of_matmul_rate"] == pytest.approx(
        record["flops_per_s"] / record["matmul_flops_per_s"]["bfloat16"], rel=1e-3
    )
    assert record["relative_error"] <= record["error_bound"]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["contender"] for row in rows] == [r["contender"] for r in records]
    assert float(rows[0]["median_us"]) == records[0]["median_us"]
    assert "rotary_write" in capsys.readouterr().out


@pytest.mark.usefixtures("known_peaks")
def test_baselines_that_cannot_run_are_left_out_with_the_reason(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert run("--op=decode", *TINY, "--dtype=int8", f"--json={path}") == 0
    records = {record["contender"]: record for record in read(path)}
    assert records["reference"]["status"] == "timed"
    reasons = {"cudnn": "cuDNN needs an NVIDIA GPU", "torch": "PyTorch"}  # no PyTorch, or one without attention to int8
    out = capsys.readouterr().out
    for name, reason in reasons.items():
        assert records[name]["status"] == "left out" and records[name]["median_us"] is None
        assert reason in records[name]["reason"] and records[name]["reason"] in out


@pytest.mark.parametrize(
    "op, name, batch", [("decode", "llama-135m", 3), ("decode", "mistral-7b-window", 2), ("chunk", "phi-2", 5)]
)
def test_torch_computes_what_the_reference_does(op, name, batch):
    pytest.importorskip("torch")
    case = Case(op, SHAPES[name], "float32", batch, context=140)
    data = kernel_cases.make_data(case, 2, seed=0)
    ((error, _),) = kernel_cases.errors(case, data, kernel_contenders.make_contender("torch", case, data).result())
    assert error < 1e-5


def _scaled(q, *arguments, **options):
    return 1.05 * decode_attention(q, *arguments, **options)


def _one_position_short(q, kv, slot, position, **options):
    return decode_attention(q, kv, slot, position - 1, **options)


def _not_a_number(q, *arguments, **options):
    return decode_attention(q, *arguments, **options).at[-1, -1, -1].set(jnp.nan)


def _raises(*arguments, **options):
    raise RuntimeError("out of registers\nat some place")


decode_attention = kernel_contenders.decode_attention


@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize("wrong", [_scaled, _one_position_short, _not_a_number, _raises])
def test_a_wrong_kernel_is_reported_as_failed_and_not_timed(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_contenders, "decode_attention", wrong)
    monkeypatch.setattr(benchmark_kernels, "Timer", None)  # making one would fail the case with another reason
    path = tmp_path / "a.jsonl"
    assert run("--op=decode", *TINY, "--backend=reference", "--baselines=none", f"--json={path}") == 1
    (record,) = read(path)
    assert record["status"] == "failed" and record["median_us"] is None and record["bytes_per_s"] is None
    assert record["reason"].startswith("wrong: its relative error" if wrong is not _raises else "out of registers")
    assert f"reference failed: {record['reason']}" in capsys.readouterr().out


@pytest.mark.usefixtures("known_peaks")
def test_a_write_to_the_wrong_place_is_reported_as_failed(tmp_path, monkeypatch):
    right = kernel_contenders.rotary_write

    def wrong(qkv, cos, sin, kv, slot, position, **options):
        return right(qkv, cos, sin, kv, slot, position.at[1].add(-1), **options)

    monkeypatch.setattr(kernel_contenders, "rotary_write", wrong)
    path = tmp_path / "a.jsonl"
    assert run("--op=rotary_write", *TINY, "--baselines=none", f"--json={path}") == 1
    assert read(path)[0]["status"] == "failed"


@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--shapes=llama9"], "--shapes: 'llama9' is unknown"),
        (["--dtype=float64"], "--dtype: 'float64' is unknown"),
        (["--batch=8,0"], "--batch: '0' must be an integer from 1"),
        (["--context="], "--context is empty"),
        (["--backend=cuda"], "--backend: 'cuda' is unknown"),
        (["--backend=triton"], "interpreted kernels are not worth timing"),
        (["--backend=tpu"], "needs a TPU, but the default device is a cpu: use reference"),
        (["--baselines=flash"], "--baselines: 'flash' is unknown"),
        (["--num_splits=4"], "--num_splits=4 has an effect on decode with triton or jax_triton only"),
        (["--tune"], "--tune is for --op=decode, not --op=all"),
        (["--op=decode", "--tune", "--baselines=torch"], "--baselines has no effect on --tune"),
        (["--slots=4"], "--slots has no effect on --op=all"),
        (["--op=step", "--batch=4"], "--batch has no effect on --op=step"),
        (["--op=step", "--dtype=int8"], "--dtype: 'int8' is unknown"),
        (["--op=step", "--cache_mb=0", "--repeats=1", "--model=nowhere.json"], "nowhere.json"),
        (["--json=/nowhere/a.jsonl"], "cannot write results"),
        (["--csv=/nowhere/a.csv"], "cannot write measurements"),
    ],
)
def test_bad_flags_get_one_sentence_and_status_1(arguments, sentence, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


@pytest.mark.usefixtures("known_peaks")
def test_tuning_prints_the_best_page_size(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    arguments = ["--backend=reference", "--context=150", "--repeats=1", f"--json={path}"]
    assert run("--op=decode", "--tune", *TINY, *arguments) == 0
    records = read(path)
    assert [(r["page_size"], r["num_splits"]) for r in records] == [(16, None), (64, None), (128, None)]
    best = min(records, key=lambda record: record["median_us"])
    assert f"best: reference, page size {best['page_size']}" in capsys.readouterr().out


@pytest.mark.usefixtures("known_peaks")
def test_a_case_that_a_backend_refuses_is_left_out_with_its_words(tmp_path, monkeypatch):
    def refuses(*arguments, **options):
        raise ValueError("head_dim=64 is odd here: use 65")

    monkeypatch.setattr(kernel_contenders, "chunk_attention", refuses)
    path = tmp_path / "a.jsonl"
    assert run("--op=chunk", *TINY, "--backend=reference", "--batch=3,99", "--baselines=none", f"--json={path}") == 0
    refused, too_many = read(path)
    assert (refused["status"], refused["reason"]) == ("left out", "head_dim=64 is odd here: use 65")
    assert too_many["reason"] == "99 rows are more than the 40 tokens of the context"


def test_tuning_tries_splits_where_a_backend_has_them(monkeypatch):
    monkeypatch.setattr("kernel_bench.options.check_runs_here", lambda name, interpret: None)
    found = options("--op=decode", "--tune", "--batch=8", "--context=4096")
    (group,) = benchmark_kernels._groups(found)
    assert {(case.shape.page_size, case.num_splits) for case in group} >= {(16, None), (64, 8), (128, 32)}
    pinned = options("--op=decode", "--tune", "--batch=8", "--context=4096", "--page_size=32", "--num_splits=2")
    ((case,),) = benchmark_kernels._groups(pinned)
    assert (case.shape.page_size, case.num_splits) == (32, 2)


@pytest.mark.usefixtures("known_peaks")
def test_the_step_is_timed_with_all_slots_decoding(tmp_path, capsys):
    path, model = tmp_path / "a.jsonl", f"{MODEL}/config.json"
    arguments = ["--slots=2", "--context=64", "--steps=2", "--repeats=2", "--cache_mb=0", "--dtype=float32"]
    assert run("--op=step", f"--model={model}", *arguments, f"--json={path}") == 0, capsys.readouterr()
    (record,) = read(path)
    assert record["status"] == "timed" and record["backend"] == resolve_backend(None)
    assert (record["slots"], record["page_size"], record["kv_dtype"]) == (2, 64, "float32")
    assert record["mean_tokens"] == pytest.approx(64, abs=3)
    config = json.loads((MODEL / "config.json").read_text())
    layers, kv_heads, head_dim = (config[n] for n in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    kv_bytes = 2 * layers * kv_heads * head_dim * 2 * record["mean_tokens"] * 4
    weight_bytes = (MODEL / "model.safetensors").stat().st_size * 2  # bfloat16 there, and a small header
    assert record["bytes"] == pytest.approx(weight_bytes + kv_bytes, rel=0.01)
    assert record["tokens_per_s"] == pytest.approx(2e6 / record["median_us"], rel=1e-3)
    assert record["share_of_roofline"] == pytest.approx(record["bytes_per_s"] / 3e10, rel=1e-3)
    assert record["prefill_tokens_per_s"] == pytest.approx(64e3 / record["prefill_ms"], rel=1e-3)


@pytest.mark.usefixtures("known_peaks")
def test_a_step_that_does_not_fit_is_left_out_with_the_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    arguments = ["--slots=2", "--context=16,100000", "--steps=9", "--repeats=9", "--cache_mb=0"]
    assert run("--op=step", f"--model={MODEL}/config.json", *arguments, f"--json={path}") == 0
    short, long = read(path)
    assert "--context=16 is too short for 101 steps" in short["reason"] and short["status"] == "left out"
    assert "the model was made for 512" in long["reason"] and long["status"] == "left out"


def test_pools_together_exceed_the_cache_as_far_as_arrays_and_memory_go():
    case = Case("decode", SHAPES["llama3-8b"], "bfloat16", batch=8, context=1024)
    assert case.pool_bytes == 32 * 2**20
    assert case.num_pools(0, GIBIBYTE) == (1, 1)
    assert case.num_pools(50 * 2**20, GIBIBYTE) == (7, 7)  # 200 MiB in pools of 32
    assert case.num_pools(50 * 2**20, 3 * case.pool_bytes) == (3, 7)
    assert case.num_pools(2**40, 2**50) == (64, 64)
    many = dataclasses.replace(case, batch=128)  # 2^27 elements: 16 pools reach 2^31
    assert many.num_pools(2**40, 2**50) == (16, 64)
    with pytest.raises(ValueError, match=r"above the 2\^31 that 32-bit offsets reach: lower --batch"):
        dataclasses.replace(case, batch=4096).num_pools(0, 2**50)
    with pytest.raises(ValueError, match="a fifth of the free memory"):
        case.num_pools(0, case.pool_bytes - 1)


@pytest.mark.parametrize(
    "op, batch, context", [("decode", 3, 50), ("decode", 3, 5), ("chunk", 7, 50), ("chunk", 50, 50)]
)
@pytest.mark.parametrize("window", [None, 1, 9])
def test_bytes_and_flops_equal_a_count_by_hand(op, batch, context, window):
    shape = AttentionShape("small", num_heads=4, num_kv_heads=2, head_dim=8, page_size=16, window=window)
    case = Case(op, shape, "float16", batch, context)
    if op == "decode":
        rows = [(slot, context - 1) for slot in range(batch)]
    else:
        rows = [(0, position) for position in range(context - batch, context)]
    seen = [(slot, range(0 if window is None else max(last + 1 - window, 0), last + 1)) for slot, last in rows]
    read = {(slot, position) for slot, positions in seen for position in positions}
    assert case.flops == sum(len(positions) for _, positions in seen) * 4 * 8 * 2 * 2
    table = case.bytes_moved - len(read) * 2 * 2 * 8 * 2 - 2 * batch * 4 * 8 * 4
    assert table == 4 * case.num_slots * -(-case.num_keys // 16)


def test_a_calls_time_is_free_of_dispatch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(kernel_timing.time, "perf_counter", lambda: clock[0])

    def loop(num_iterations):
        def run(_):
            clock[0] += 0.003 + num_iterations * 0.0005  # dispatch, and calls

        return run

    timing = kernel_timing.measure({"a": kernel_timing.Timer(loop)}, repeats=5)["a"]
    assert timing.quantile(0.5) == pytest.approx(0.0005)
    assert timing.one_call == pytest.approx(0.0035)
    assert timing.num_iterations == 15  # 50 ms of single calls


def test_a_long_call_is_timed_by_itself_and_every_pool_is_visited_else(monkeypatch):
    clock, starts = [0.0], []
    monkeypatch.setattr(kernel_timing.time, "perf_counter", lambda: clock[0])

    def loop(seconds):
        def of(num_iterations):
            def run(start):
                starts.append(start)
                clock[0] += num_iterations * seconds

            return run

        return of

    assert kernel_timing.Timer(loop(0.06), min_iterations=40).num_iterations == 1
    assert len(set(starts)) > 3  # each call begins with another pool
    assert kernel_timing.Timer(loop(0.04), min_iterations=40).num_iterations == 40
    assert kernel_timing.Timer(loop(1e-9), min_iterations=40).num_iterations == 1000


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_pages_of_every_dtype_stand_for_numbers_of_about_unit_size(dtype):
    case = Case("decode", SHAPES["llama-135m"], dtype, batch=2, context=64)
    data = kernel_cases.make_data(case, 2, seed=0)
    kv = data.kv(data.tables[0])
    scale = 1 if kv.k_scale is None else np.asarray(kv.k_scale)[:, None, None]
    k = np.asarray(kernel_cases.as_float(kv.k)) * scale
    assert np.std(k) == pytest.approx(1, abs=0.1)
    assert sorted(np.asarray(data.tables).reshape(-1)) == list(range(len(k)))
