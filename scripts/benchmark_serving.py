"""Measures how long users wait under a load: requests arrive at random, at several rates in turn.

    python scripts/benchmark_serving.py --rates 2,4,8,16 --slo ttft_ms:500,tpot_ms:100
    python scripts/benchmark_serving.py --rates 1,2,3 --burstiness 0.3 --model configs/models/llama-135m.json --json out.jsonl

Arrivals are a Poisson process, or with --burstiness below 1 come in bursts (gamma-distributed gaps); every rate has the same
gaps, stretched. The load is open (`lib/serving_load.py`). The table has milliseconds. TTFT: from when a request was due to its
first token; TPOT: per token after the first; ITL: between two tokens; E2E: to the last token. Goodput: requests per second that
kept all bounds of --slo. "above capacity": requests piled up as long as they arrived, so latencies grow with the run's length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from lib import workloads
from lib.command import run_command
from lib.engine_options import (
    BENCHMARK,
    EngineOptions,
    define_engine_flags,
    fitted_options,
    load_model,
    make_warm_engine,
)
from lib.flag_values import options_from_flags, positive_numbers
from lib.plot import Line, Panel, check_plot, save_plot
from lib.records import PERCENTILES, Record, outputs, provenance
from lib.serving_load import Trace, arrival_times, offer, parse_slos, summarize
from lib.table import Table
from lib.workloads import Workload

from jaxserve import timeline
from jaxserve.commands import flags as cli

_METHOD = (
    "open load in the engine's thread; times from when a request was due to when the call that brought the token was read; "
    "gaps gamma-distributed and stretched to the rate; rates one after the other on a drained engine, after an untimed run of "
    "two requests; queue_growth: slope of the requests without a slot over the last three quarters of the arrivals, by the rate"
)
_LATENCIES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}
_COLUMNS = (
    {"rate": 6, "req/s": 6, "tok/s": 7, "goodput": 7}
    | {f"{name} {part}": 8 for name in _LATENCIES for part in ("median", "p99")}
    | {"waiting": 7, "load": 14}
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    engine: EngineOptions
    workload: Workload
    workload_flags: dict[str, Any]
    rates: tuple[float, ...]
    burstiness: float
    slos: dict[str, float]
    steps_per_call: int
    seed: int
    json: str | None
    plot: str | None
    timeline: str | None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    workloads.define_flags(values)
    define_engine_flags(values, max_waiting="no bound", max_steps_per_call="that of --steps_per_call")
    cli.define_timeline_flag(values)
    to: dict[str, Any] = {"flag_values": values, "module_name": BENCHMARK}
    flags.DEFINE_list("rates", "1,2,4,8", "Requests per second, a run for each; inf: all at once.", **to)
    flags.DEFINE_float(
        "burstiness", 1.0, "Shape of the gaps: 1 is a Poisson process, less is bursts, more is regular.", **to
    )
    flags.DEFINE_string("slo", "", "Bounds for goodput, such as ttft_ms:500,tpot_ms:100; also e2e_ms.", **to)
    flags.DEFINE_integer(
        "steps_per_call", 1, "Steps per call of the engine; the host reads tokens once per call.", lower_bound=1, **to
    )
    flags.DEFINE_string("json", None, "Write the records as JSON lines to this file.", **to)
    flags.DEFINE_string(
        "plot", None, "Draw latencies and goodput over the rate into this file: .png, .svg or .pdf.", **to
    )


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid, or has no effect beside the others.
    """
    finite = [rate for rate in values.rates if rate != "inf"]
    rates = positive_numbers("rates", finite) if finite or not values.rates else ()
    rates += (float("inf"),) * (len(finite) < len(values.rates))
    if not 0.01 <= values.burstiness <= 1000:
        raise ValueError(f"--burstiness={values.burstiness} must lie in [0.01, 1000]: 1 is a Poisson process")
    slos = parse_slos(values.slo)
    if values.timeline is not None:
        if len(rates) > 1:
            raise ValueError(f"--timeline is of one run, but there are {len(rates)} --rates: give one")
        timeline.check_path(values.timeline)
    check_plot(values.plot)
    model, tokenizer = load_model(fitted_options(values))
    workload = workloads.workload_from_flags(values, model.vocab_size, tokenizer)
    engine = fitted_options(
        values, max_model_len=workload.longest, max_waiting=None, max_steps_per_call=values.steps_per_call
    )
    for name, needed in (("max_model_len", workload.longest), ("max_steps_per_call", values.steps_per_call)):
        if getattr(engine.config, name) < needed:
            raise ValueError(f"{name}={getattr(engine.config, name)} is below the {needed} that are needed: raise it")
    workload_flags = workloads.describe_workload(values)
    return options_from_flags(
        Options, values, engine=engine, workload=workload, workload_flags=workload_flags, rates=rates, slos=slos
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _run(parse_options(values)))


def _run(options: Options) -> int:
    common: Record = {}
    records = []
    with outputs(None, options.json, lambda: common) as write:
        engine = make_warm_engine(options.engine)
        common |= {
            "model": options.engine.model or "demo",
            "dtype": options.engine.dtype,
            "engine": dataclasses.asdict(engine.config),
            "workload": options.workload_flags,
            "burstiness": options.burstiness,
            "slos_ms": options.slos,
            "steps_per_call": options.steps_per_call,
            **provenance(_METHOD, options.seed),
        }
        prompts, params = options.workload.prompts, options.workload.params
        offer(engine, prompts[:2], params[:2], [0.0, 0.0][: len(prompts)], steps_per_call=options.steps_per_call)
        print(f"{common['device']}, {common['model']}, {len(prompts)} requests per rate; milliseconds")
        table = Table(_COLUMNS)
        for rate in options.rates:
            with timeline.recording(engine, options.timeline):
                trace = _offer(engine, options, rate)
            record = {"rate": rate if rate < float("inf") else "inf", **summarize(trace, rate, options.slos)}
            write(record)
            records.append(record)
            table.print_row(_cells(record))
    for line in _notes(records):
        print(line)
    save_plot(options.plot, _panels(records), title=f"{common['device']}, {common['model']}")
    return 0


def _offer(engine: Any, options: Options, rate: float) -> Trace:
    workload = options.workload
    due = arrival_times(rate, options.burstiness, len(workload), np.random.default_rng(options.seed))
    return offer(engine, workload.prompts, workload.params, due, steps_per_call=options.steps_per_call)


def _cells(record: Record) -> Record:
    load = {True: "above capacity", False: "", None: "cannot tell" if record["rate"] != "inf" else ""}
    cells = {
        "rate": record["rate"],
        "req/s": record["requests_per_s"],
        "tok/s": record["output_tokens_per_s"],
        "goodput": record["goodput_requests_per_s"],
        "waiting": record["most_waiting"],
        "load": load[record["above_capacity"]],
    }
    for name, key in _LATENCIES.items():
        cells |= {f"{name} {part}": record[key][part] for part in ("median", "p99")}
    return cells


def _notes(records: Sequence[Record]) -> list[str]:
    """Returns lines about rates above capacity and about refused requests."""
    notes = [
        f"rate {record['rate']}: {100 * record['queue_growth']:.0f}% of what arrived was left over while it arrived; latencies "
        "grow with the number of requests"
        for record in records
        if record["above_capacity"]
    ]
    refused = [
        f"rate {record['rate']}: {record['num_refused']} requests refused"
        for record in records
        if record["num_refused"]
    ]
    return notes + refused


def _panels(records: Sequence[Record]) -> list[Panel]:
    finite = [record for record in records if record["rate"] != "inf"]
    rates = [record["rate"] for record in finite]
    if not rates:
        return []
    panels = [
        Panel(
            name,
            "requests/s offered",
            "ms",
            [Line(part, rates, [record[key][part] for record in finite]) for part in PERCENTILES],
            log_y=True,
        )
        for name, key in _LATENCIES.items()
        if all(record[key]["median"] for record in finite)
    ]
    done = [
        Line("finished", rates, [record["requests_per_s"] for record in finite]),
        Line("offered", rates, rates, True),
    ]
    if finite[0]["goodput_requests_per_s"] is not None:
        done.append(Line("within SLOs", rates, [record["goodput_requests_per_s"] for record in finite]))
    return [*panels, Panel("throughput", "requests/s offered", "requests/s", done)]


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
