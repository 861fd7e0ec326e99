"""Measures the kernels, and the engine's step that is made of them, on the default device.

    python scripts/benchmark_kernels.py --op decode --shapes llama3-8b --batch 1,8,64,256 --context 1024,4096,16384
    python scripts/benchmark_kernels.py --op chunk --batch 2048 --context 2048,16384 --json chunk.jsonl
    python scripts/benchmark_kernels.py --op decode --tune --batch 8 --context 16384
    python scripts/benchmark_kernels.py --op step --model configs/models/llama3-8b.json --slots 1,8,64,256 --context 4096

The backends that run here and the baselines (plain JAX, cuDNN, PyTorch) take turns on the same data; those that cannot run are
named with the reason. Each result is compared with the reference before it is timed; a wrong one is reported as failed, is not
timed, and makes the exit status 1. Times leave dispatch out (`lib/timing.py`), and the data is more than caches hold (see
`--cache_mb`). The peaks of the device are measured in the same run. `kernel_bench/step_timing.py` explains how the step is
timed.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from kernel_bench import options as benchmark_options
from kernel_bench.cases import OPS, Case, Data, errors, make_data
from kernel_bench.contenders import SPLITTING, Unavailable, make_contender
from kernel_bench.options import Options, define_flags, parse_options
from kernel_bench.report import ReportTable, environment, rates
from kernel_bench.step_timing import StepBench, StepCase
from lib.command import first_line, run_command
from lib.device import device_name, free_bytes
from lib.peaks import Peaks, measure_peaks
from lib.records import Record, Write, outputs, rounded, times
from lib.roofline import prefill_flops, work_of_decode
from lib.timing import Timer, measure

from jaxserve.config import EngineConfig, read_json_object
from jaxserve.models import families
from jaxserve.models.params import random_params
from pallas_kernels.backend import BACKENDS
from pallas_kernels.paged_attention.shapes import SHAPES

_MEMORY_SHARE = 5  # room for the pools, their copies for baselines, and the arrays that they are made from
_TUNED_SPLITS, _TUNED_PAGES = (None, 1, 2, 4, 8, 16, 32), (16, 64, 128)
_RATES = ("bytes", "bytes_per_s", "flops", "flops_per_s", "share_of_copy_bandwidth", "share_of_read_bandwidth")
_MEASURED = (
    *("reason", "relative_error", "error_bound", "num_pools", "pool_bytes"),
    *("median_us", "min_us", "p90_us", "one_call_us", "iterations", *_RATES, "share_of_matmul_rate"),
)
_STEP_MEASURED = (
    *("reason", "tile_sizes", "num_pages", "pool_bytes", "mean_tokens"),
    *("median_us", "min_us", "p90_us", "one_call_us", "iterations", *_RATES, "share_of_matmul_rate"),
    *("tokens_per_s", "share_of_roofline"),
    *("prefill_ms", "prefill_tokens_per_s", "prefill_flops_per_s", "prefill_share_of_matmul_rate"),
)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the benchmark; returns its exit status, 1 after an error or if a result was wrong."""
    return run_command(argv, lambda: _run(parse_options(values)))


def _run(options: Options) -> int:
    common: Record = {}
    with outputs(options.csv, options.json, lambda: common) as write:
        print(f"{device_name()}, jax {jax.__version__}")
        peaks = _measure_peaks(options)
        step = options.op == "step"
        common |= environment(peaks, "step" if step else "kernel", options.seed)
        table = ReportTable(step=step)
        statuses = (_run_step if step else _run_kernels)(options, peaks, write, table)
    return 1 if "failed" in statuses else 0


def _measure_peaks(options: Options) -> Peaks:
    dtypes = [_product_dtype(dtype) for dtype in options.dtypes]
    peaks = measure_peaks(dtypes, cache_bytes=options.cache_bytes, repeats=min(options.repeats, 5))
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in peaks.matmul_flops_per_s.items())
    print(
        f"copy {peaks.copy_bytes_per_s / 1e9:.4g} GB/s, read {peaks.read_bytes_per_s / 1e9:.4g} GB/s, products: {rates}"
    )
    return peaks


def _product_dtype(dtype: str) -> str:
    """Returns the dtype in which pages of `dtype` are multiplied, for the peak to compare with; 8 bits are widened to 16."""
    return dtype if dtype in ("float32", "float16") else "bfloat16"


def _run_kernels(options: Options, peaks: Peaks, write: Write, table: ReportTable) -> set[str]:
    """Measures all cases; returns the statuses that occurred."""
    statuses: set[str] = set()
    for cases in _groups(options):
        timed = []
        for case in cases:
            for record in _measure_case(case, options, peaks):
                write(record)
                table.print(record)
                statuses.add(record["status"])
                timed += [record] if record["status"] == "timed" else []
        if options.tune and timed:
            best = min(timed, key=lambda record: record["median_us"])
            splits = best["num_splits"] or "its own choice"
            print(
                f"  best: {best['contender']}, page size {best['page_size']}, splits: {splits}, {best['median_us']} us"
            )
    return statuses


def _groups(options: Options) -> Iterator[list[Case]]:
    """Yields groups of cases; --tune chooses among the cases of a group."""
    ops = OPS if options.op == "all" else (options.op,)
    for op, name, dtype in itertools.product(ops, options.shapes, options.dtypes):
        contexts = (min(options.contexts),) if op == "rotary_write" else options.contexts
        pages, splits = (options.page_size or SHAPES[name].page_size,), (options.num_splits,)
        if options.tune:
            pages = _TUNED_PAGES if options.page_size is None else pages
            splits = _TUNED_SPLITS if options.num_splits is None and set(options.backends) & set(SPLITTING) else splits
        for batch, context in itertools.product(options.batches, contexts):
            yield [
                Case(op, dataclasses.replace(SHAPES[name], page_size=page_size), dtype, batch, context, num_splits)
                for page_size, num_splits in itertools.product(pages, splits)
            ]


def _measure_case(case: Case, options: Options, peaks: Peaks) -> list[Record]:
    """Returns one record per contender: timed, left out with a reason, or failed."""
    names = options.backends if options.tune else tuple(dict.fromkeys((*options.backends, *options.baselines)))
    if options.tune and case.num_splits is not None:
        names = tuple(name for name in names if name in SPLITTING)
    records = {name: _record(case, name, options) for name in names}
    try:
        num_pools, enough = case.num_pools(options.cache_bytes, free_bytes() // _MEMORY_SHARE)
    except ValueError as error:
        return [record | {"reason": str(error)} for record in records.values()]
    if num_pools < enough:
        print(f"  {num_pools} pools of the {enough} that exceed the cache fit {case.batch} x {case.context} tokens")
    data = make_data(case, num_pools, options.seed)
    timers: dict[str, Timer] = {}
    for name, record in records.items():
        record |= {"num_pools": num_pools, "pool_bytes": case.pool_bytes}
        try:
            timers |= _checked_timer(name, case, data, record)
        except (Unavailable, ValueError) as error:  # ValueError: the backend refuses the shape or the dtype
            record |= {"reason": str(error)}
        except Exception as error:  # compilers and libraries raise all kinds; the other contenders are still measured
            failed = name in BACKENDS
            record |= {"status": "failed" if failed else "left out", "reason": first_line(error)}
    for name, timing in measure(timers, options.repeats).items():
        seconds, dtype = timing.quantile(0.5), _product_dtype(case.dtype)
        records[name] |= {"status": "timed"} | times(timing)
        records[name] |= rates(case.bytes_moved, case.flops, seconds, peaks, dtype)
    return list(records.values())


def _checked_timer(name: str, case: Case, data: Data, record: Record) -> dict[str, Timer]:
    """Returns the contender's timer by its name, or nothing if its result is wrong; adds the result's error to `record`."""
    contender = make_contender(name, case, data)
    error, bound = max(errors(case, data, contender.result()), key=lambda pair: pair[0] / pair[1])
    record |= {"relative_error": rounded(error), "error_bound": bound}
    if not error <= bound:
        status = "failed" if name in BACKENDS else "left out"
        record |= {"status": status, "reason": f"wrong: its relative error is {error:.2g}, above {bound:.2g}"}
        return {}
    calls = contender.calls_per_iteration
    return {name: Timer(contender.loop, min_iterations=-(-data.num_pools // calls), calls_per_iteration=calls)}


def _record(case: Case, name: str, options: Options) -> Record:
    shape = {key: value for key, value in dataclasses.asdict(case.shape).items() if key != "name"}
    return {
        "op": case.op,
        "contender": name,
        "shape": case.shape.name,
        **shape,
        "dtype": case.dtype,
        "batch": case.batch,
        "context": case.context,
        "num_splits": case.num_splits if name in SPLITTING and case.op == "decode" else None,
        "repeats": options.repeats,
        "status": "left out",
        **dict.fromkeys(_MEASURED),
    }


def _run_step(options: Options, peaks: Peaks, write: Write, table: ReportTable) -> set[str]:
    """Measures the step for all slots and contexts; returns the statuses that occurred."""
    model = families.read_model_config(options.model)
    statuses: set[str] = set()
    for dtype in options.dtypes:
        engine = _step_engine(options, dtype)
        params = random_params(model, options.seed, dtype)
        for slots, context in itertools.product(options.slots, options.contexts):
            case = StepCase(model, slots, context, options.steps, options.repeats, engine)
            record = _measure_step(case, params, dtype, options, peaks)
            write(record)
            table.print(record)
            statuses.add(record["status"])
        del params  # before the next ones are made
    return statuses


def _step_engine(options: Options, dtype: str) -> EngineConfig:
    """Returns the engine's options: those of the file, or options with which a long prompt keeps an accelerator busy."""
    if options.engine_config is None:
        fields: Record = {"page_size": 64, "chunk_size": 256 if jax.default_backend() == "cpu" else 2048}
    else:
        fields = read_json_object(options.engine_config, "engine config")
        if fields.get("interpret_kernels"):
            raise ValueError(f"{options.engine_config} has interpret_kernels: interpreted kernels are not worth timing")
    if options.page_size is not None:
        fields["page_size"] = options.page_size
    return EngineConfig.from_dict({"kv_dtype": dtype} | fields | {"attention_backend": options.backends[0]})


def _measure_step(case: StepCase, params: Any, dtype: str, options: Options, peaks: Peaks) -> Record:
    record = {
        "op": "step",
        "model": pathlib.Path(options.model).stem,
        "dtype": dtype,
        "backend": case.engine.backend,
        "kv_dtype": case.engine.kv_dtype,
        "slots": case.slots,
        "context": case.context,
        "page_size": case.engine.page_size,
        "chunk_size": case.engine.chunk_size,
        "deterministic": case.engine.deterministic,
        "repeats": case.repeats,
        "status": "left out",
        **dict.fromkeys(_STEP_MEASURED),
    }
    model = case.model
    try:
        bench = StepBench(case, params)
        record |= {"tile_sizes": list(bench.config.tile_sizes), "num_pages": bench.config.num_pages}
        record |= {"pool_bytes": bench.pool_bytes}
        prefill_s, timing = bench.prefill(), bench.decode()
    except ValueError as error:
        return record | {"reason": str(error)}
    except Exception as error:  # compilers raise all kinds; other numbers of slots are still measured
        return record | {"status": "failed", "reason": first_line(error)}
    seconds = timing.quantile(0.5)
    work = work_of_decode(model, dtype, str(bench.config.kv_dtype), slots=case.slots, num_tokens=case.mean_tokens)
    num_bytes, flops = int(work.num_bytes[0]), int(work.flops[0])
    prefill_flops_per_s = prefill_flops(model, dtype, case.context) / prefill_s
    return (
        record
        | times(timing)
        | rates(num_bytes, flops, seconds, peaks, dtype)
        | {
            "status": "timed",
            "mean_tokens": case.mean_tokens,
            "tokens_per_s": rounded(case.slots / seconds),
            "share_of_roofline": rounded(num_bytes / peaks.bytes_per_s / seconds),
            "prefill_ms": rounded(1e3 * prefill_s),
            "prefill_tokens_per_s": rounded(case.context / prefill_s),
            "prefill_flops_per_s": rounded(prefill_flops_per_s),
            "prefill_share_of_matmul_rate": rounded(prefill_flops_per_s / peaks.matmul_flops_per_s[dtype]),
        }
    )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(benchmark_options)  # so that --help lists them
    app.run(main)
