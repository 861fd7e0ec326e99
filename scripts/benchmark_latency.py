"""Measures latencies of requests that start together: of the whole batch, of the first token, and of each further token.

    python scripts/benchmark_latency.py --batch_sizes 1,8,32 --input_lens 128 --output_lens 128
    python scripts/benchmark_latency.py --batch_sizes 1 --model configs/models/llama-135m.json --json latency.jsonl

The engine has as many slots as the largest batch. The table has milliseconds. A single stream is compared with the limit of any
engine that reads all weights once per token: their bytes over the read bandwidth, which the same run measures before and after
(`lib/machine_rates.py`); the higher one counts.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from lib import machine_rates
from lib.command import run_command
from lib.engine_options import (
    BENCHMARK,
    EngineOptions,
    define_engine_flags,
    fitted_options,
    load_model,
    make_warm_engine,
)
from lib.flag_values import integers, options_from_flags
from lib.plot import Line, Panel, check_plot, save_plot
from lib.records import PERCENTILES, Record, outputs, provenance, rounded, spread
from lib.roofline import weight_bytes_per_token
from lib.serving_load import Trace, offer
from lib.table import Table, percent

from jaxserve import ModelConfig, SamplingParams

_METHOD = (
    "all requests of a batch handed over at once, random prompts, greedy, no end-of-sequence; one untimed run of each case, "
    "then cases in turns; a token's time is when the call that brought it was read; batch latency over repeats, others over "
    "requests and repeats; limit: bytes of the weights that a token needs, over the best read bandwidth of this run"
)
_LATENCIES = {"batch": "batch_ms", "TTFT": "ttft_ms", "TPOT": "tpot_ms"}
_COLUMNS = (
    {"batch size": 10, "input": 6, "output": 6}
    | {f"{name} {part}": 9 for name in _LATENCIES for part in ("median", "p90", "p99")}
    | {"tok/s": 7, "of limit": 8}
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests of equal lengths, in tokens, that start together."""

    batch_size: int
    input_len: int
    output_len: int


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    engine: EngineOptions
    model: ModelConfig
    cases: tuple[Case, ...]
    steps_per_call: int
    repeats: int
    seed: int
    json: str | None
    plot: str | None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    define_engine_flags(values, max_slots="the largest batch", max_steps_per_call="that of --steps_per_call")
    to: dict[str, Any] = {"flag_values": values, "module_name": BENCHMARK}
    flags.DEFINE_list("batch_sizes", "1,8,32", "Requests that start together.", **to)
    flags.DEFINE_list("input_lens", "128", "Tokens of each prompt.", **to)
    flags.DEFINE_list("output_lens", "128", "Tokens generated for each.", **to)
    flags.DEFINE_integer(
        "steps_per_call", 1, "Steps per call of the engine; the host reads tokens once per call.", lower_bound=1, **to
    )
    flags.DEFINE_integer("repeats", 5, "Timed runs of each case.", lower_bound=1, **to)
    flags.DEFINE_integer("seed", 0, "Seed of the prompts.", lower_bound=0, upper_bound=2**31 - 1, **to)
    flags.DEFINE_string("json", None, "Write the records as JSON lines to this file.", **to)
    flags.DEFINE_string("plot", None, "Draw latencies over the batch size into this file: .png, .svg or .pdf.", **to)


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid.
    """
    lists = [integers(name, values[name].value or ()) for name in ("batch_sizes", "input_lens", "output_lens")]
    cases = tuple(Case(*sizes) for sizes in itertools.product(*lists))
    check_plot(values.plot)
    model, _ = load_model(fitted_options(values))
    needed = {
        "max_slots": max(lists[0]),
        "max_model_len": max(lists[1]) + max(lists[2]),
        "max_steps_per_call": values.steps_per_call,
    }
    if needed["max_model_len"] > model.max_position:
        raise ValueError(
            f"prompt and output have {needed['max_model_len']} tokens, but the model was made for {model.max_position}: "
            "lower --input_lens or --output_lens"
        )
    engine = fitted_options(values, max_waiting=None, **needed)
    for name, least in needed.items():
        if getattr(engine.config, name) < least:
            raise ValueError(f"{name}={getattr(engine.config, name)} is below the {least} that are needed: raise it")
    return options_from_flags(Options, values, engine=engine, model=model, cases=cases)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _run(parse_options(values)))


def _run(options: Options) -> int:
    common: Record = {}
    dtype = options.engine.dtype
    with outputs(None, options.json, lambda: common) as write:
        peaks = [machine_rates.measure([dtype])]
        engine = make_warm_engine(options.engine)
        traces = measure(engine, options)
        peaks.append(machine_rates.measure([dtype]))
        bandwidth = max(peak["read"]["bytes_per_s"] for peak in peaks)
        needed = weight_bytes_per_token(options.model, dtype, engine.config.weight_dtype)
        limit_ms = 1e3 * needed / bandwidth
        common |= {
            "model": options.engine.model or "demo",
            "dtype": dtype,
            "engine": dataclasses.asdict(engine.config),
            "steps_per_call": options.steps_per_call,
            "repeats": options.repeats,
            "read_bytes_per_s": rounded(bandwidth),
            "weight_bytes": needed,
            **provenance(_METHOD, options.seed),
        }
        print(
            f"{common['device']}, {common['model']} in {dtype}; milliseconds; weights of "
            f"{common['weight_bytes'] / 1e6:.1f} MB at {bandwidth / 1e9:.1f} GB/s take {limit_ms:.3g} ms per token"
        )
        table, records = Table(_COLUMNS), []
        for case, runs in traces.items():
            record = summarize(case, runs, limit_ms)
            write(record)
            records.append(record)
            table.print_row(_cells(record))
    save_plot(options.plot, list(_panels(records)), title=f"{common['device']}, {common['model']} in {dtype}")
    return 0


def measure(engine: Any, options: Options) -> dict[Case, list[Trace]]:
    """Runs the cases in turns and returns the runs of each; each run has other prompts, and the first one is not counted."""
    rng = np.random.default_rng(options.seed)
    traces: dict[Case, list[Trace]] = {case: [] for case in options.cases}
    for repeat in range(options.repeats + 1):
        for case, runs in traces.items():
            prompts = rng.integers(0, options.model.vocab_size, (case.batch_size, case.input_len)).tolist()
            params = SamplingParams(temperature=0, max_tokens=case.output_len, ignore_eos=True, detokenize=False)
            due = [0.0] * case.batch_size
            trace = offer(engine, prompts, [params] * len(due), due, steps_per_call=options.steps_per_call)
            if repeat:
                runs.append(trace)
    return traces


def summarize(case: Case, runs: Sequence[Trace], limit_ms: float) -> Record:
    """Returns the figures of a case.

    Raises:
      RuntimeError: if a request did not get all its tokens.
    """
    served = [one for run in runs for one in run.served]
    wrong = {len(one.token_times) for one in served} - {case.output_len}
    if wrong:
        raise RuntimeError(f"a request got {min(wrong)} tokens, not {case.output_len}")
    batch = [max(one.e2e_ms for one in run.served) for run in runs]
    tpot = [one.tpot_ms for one in served if one.tpot_ms is not None]
    single = case.batch_size == 1 and bool(tpot)
    return {
        **dataclasses.asdict(case),
        "batch_ms": spread(batch),
        "ttft_ms": spread([one.ttft_ms for one in served]),
        "tpot_ms": spread(tpot),
        "output_tokens_per_s": rounded(1e3 * case.batch_size * case.output_len / float(np.median(batch))),
        "limit_ms_per_token": rounded(limit_ms) if single else None,
        "tpot_over_limit": rounded(float(np.median(tpot)) / limit_ms) if single else None,
        "share_of_limit": rounded(limit_ms / float(np.median(tpot))) if single else None,
    }


def _cells(record: Record) -> Record:
    cells = {
        "batch size": record["batch_size"],
        "input": record["input_len"],
        "output": record["output_len"],
        "tok/s": record["output_tokens_per_s"],
        "of limit": percent(record["share_of_limit"]),
    }
    for name, key in _LATENCIES.items():
        cells |= {f"{name} {part}": record[key][part] for part in PERCENTILES}
    return cells


def _panels(records: Sequence[Record]) -> Iterator[Panel]:
    """Yields a panel per latency over the batch size, with a curve per pair of input and output length."""
    lengths = dict.fromkeys((record["input_len"], record["output_len"]) for record in records)
    for name, key in _LATENCIES.items():
        lines = []
        for pair in lengths:
            chosen = [
                record
                for record in sorted(records, key=lambda record: record["batch_size"])
                if (record["input_len"], record["output_len"]) == pair and record[key]["median"] is not None
            ]
            sizes = [record["batch_size"] for record in chosen]
            lines.append(Line(f"{pair[0]} in, {pair[1]} out", sizes, [record[key]["median"] for record in chosen]))
        yield Panel(f"{name}, median", "batch size", "ms", lines)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
