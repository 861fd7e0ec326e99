"""Measures the cost of a step as one quantity at a time grows: the scheduler alone, all but the model, and the whole step.

    python scripts/benchmark_scaling.py --what=scheduler --json scaling.jsonl --plot scaling.png
    python scripts/benchmark_scaling.py --what=step --sweep=slots,long --model configs/models/llama-135m.json
    python scripts/benchmark_scaling.py --what=scheduler --sweep=pages --points=1000,1000000

    slots       sequences that decode at the same time, a slot for each     queue       sequences that wait for a slot
    active      slots in use, of --slots                                    vocabulary  tokens in it
    long        one long sequence among short ones, against as many         turnover    sequences that end, and are admitted,
                tokens evenly spread: attention must cost alike                         in each step
    context     tokens of each sequence                                     capacity    the longest sequence there is room for
    pages       in the pool

"scheduler" is all of a step but the model and the sampler (`scaling/timing.py`). "rest" is all but the model: `run_steps` with
a model of one layer, eight wide, which writes as many logits. The table has microseconds per step. A line is fitted to each
curve by relative least squares; its constants are printed with the relative error of the worst point.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from lib.command import first_line, run_command
from lib.device import device_name
from lib.flag_values import integers, names, options_from_flags
from lib.plot import Line, Panel, check_plot, save_plot
from lib.records import Record, outputs, provenance, rounded, times
from lib.table import Table, factor
from scaling.cases import SWEEPS, Base, Case, busy_state, make_cases
from scaling.timing import Bench, Pools, make_step, make_stub, stub_model

from jaxserve import EngineConfig, ModelConfig, prepare
from jaxserve.commands.flags import DTYPES
from jaxserve.config import read_json_object
from jaxserve.engine.capacity import resolve_capacities
from jaxserve.models import families
from jaxserve.models.params import random_params

_WHAT = ("scheduler", "rest", "step")
_STEPS = {"scheduler": 1000, "rest": 64, "step": 8}
_TURNOVER_STEPS = 64  # fewer, as each step needs sequences that wait
_METHOD = (
    "(time of a call of n steps - median time of a call of one) / (n - 1); the same state before every call; cases of a sweep "
    "in turns; scheduler: no model, no sampler; rest: a model of one layer, 8 wide; step: random weights, keys and values; "
    "fit: relative least squares"
)
_COLUMNS = {"sweep": 10, "what": 9, "series": 8, "value": 9, "us/step": 9, "min": 9, "p90": 9, "tokens": 8, "pages": 8}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    what: tuple[str, ...]
    sweeps: tuple[str, ...]
    points: tuple[int, ...]
    model: str
    dtype: str
    slots: int
    context: int
    steps: int | None
    repeats: int
    engine: dict[str, Any]
    seed: int
    json: str | None
    plot: str | None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list("what", "all", f"What to time, or all: {', '.join(_WHAT)}.", **to)
    flags.DEFINE_list("sweep", "all", f"What to vary, or all: {', '.join(SWEEPS)}.", **to)
    flags.DEFINE_list("points", [], "Values of one sweep, in place of the default ones.", **to)
    flags.DEFINE_string("model", "configs/models/llama-135m.json", "A config.json file; weights are random.", **to)
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Dtype of weights, keys and values.", **to)
    flags.DEFINE_integer("slots", 32, "Slots, where they are not varied.", lower_bound=1, **to)
    flags.DEFINE_integer(
        "context", 256, "Tokens per sequence at first, where they are not varied.", lower_bound=2, **to
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "Steps per timed call; by default 1000 of the scheduler, 64 without a model, 8 whole ones.",
        2,
        **to,
    )
    flags.DEFINE_integer("repeats", 10, "Timed calls per case.", lower_bound=1, **to)
    flags.DEFINE_string("engine_config", None, "A JSON file; its slots, pages, rows and lengths do not count.", **to)
    flags.DEFINE_integer("seed", 0, "Seed of tokens, pages and weights.", lower_bound=0, upper_bound=2**31 - 1, **to)
    flags.DEFINE_string("json", None, "Write measurements and fits as JSON lines to this file.", **to)
    flags.DEFINE_string("plot", None, "Draw the curves into this file: .png, .svg or .pdf.", **to)


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid, or has no effect beside the others.
    """
    sweeps, what = names("sweep", values.sweep, tuple(SWEEPS)), names("what", values.what, _WHAT)
    if values.points and len(sweeps) > 1:
        raise ValueError(f"--points are of one sweep, but --sweep={','.join(values.sweep)}: choose one")
    if "scheduler" not in what and not any(SWEEPS[name].of_model for name in sweeps):
        raise ValueError(f"--sweep={','.join(sweeps)} is about the scheduler only: use --what=scheduler")
    check_plot(values.plot)
    path = values.engine_config
    return options_from_flags(
        Options,
        values,
        what=what,
        sweeps=sweeps,
        points=integers("points", values.points, low=0) if values.points else (),
        engine=read_json_object(path, "engine config") if path is not None else {},
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _run(parse_options(values)))


def _run(options: Options) -> int:
    model = families.read_model_config(options.model)
    engine = EngineConfig.from_dict({"kv_dtype": options.dtype} | options.engine)
    common = {
        "model": pathlib.Path(options.model).stem,
        "dtype": options.dtype,
        "engine_config": options.engine,
        "repeats": options.repeats,
        **provenance(_METHOD, options.seed),
    }
    plans = [
        (what, name, cases, steps)
        for name in options.sweeps
        for what in options.what
        if what == "scheduler" or SWEEPS[name].of_model
        for steps in [_num_steps(options, what, name)]
        for cases in [_cases(options, what, name, model, engine, steps)]
    ]
    records: list[Record] = []
    with outputs(None, options.json, lambda: common) as write:
        print(f"{device_name()}, {common['model']} in {options.dtype}; microseconds per step")
        table = Table(_COLUMNS)
        for what, name, cases, steps in plans:
            for record in _measure(what, cases, model, engine, options, steps):
                write(record)
                records.append(record)
                _print(table, record)
            for fit in fits_of(name, what, records):
                write(fit)
                print(f"  {describe_fit(fit)}", flush=True)
    save_plot(options.plot, _panels(records), title=f"{common['device']}, {common['model']} in {options.dtype}")
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _num_steps(options: Options, what: str, name: str) -> int:
    steps = options.steps or _STEPS[what]
    return min(steps, _TURNOVER_STEPS) if name == "turnover" and options.steps is None else steps


def _cases(options: Options, what: str, name: str, model: ModelConfig, engine: EngineConfig, steps: int) -> list[Case]:
    base = Base(options.slots, options.context, model.vocab_size, steps, engine.page_size)
    cases = make_cases(name, base, options.points)
    return [
        case for case in cases if case.lengths or what == "scheduler"
    ]  # the whole engine takes no step when it is idle


def _measure(
    what: str, cases: list[Case], model: ModelConfig, engine: EngineConfig, options: Options, steps: int
) -> Iterator[Record]:
    """Times the cases in turns and yields a record for each; one that could not be measured has the reason."""
    benches: list[Bench] = []
    records = [_record(what, case, steps) for case in cases]
    made: dict[int, Bench] = {}
    pools, weights = Pools(), {}
    for index, case in enumerate(cases):
        same_vocab = dataclasses.replace(model, vocab_size=case.vocab_size)
        of_case = stub_model(case.vocab_size) if what == "rest" else same_vocab
        config = case.config(engine, steps)
        try:
            if what == "scheduler":
                state = busy_state(case, stub_model(case.vocab_size), config, options.seed)
                bench = Bench(case, config, state, make_stub(config), steps)
            else:
                if of_case not in weights:
                    weights = {of_case: random_params(of_case, options.seed, options.dtype)}
                config = resolve_capacities(config, of_case, weights[of_case])
                weights = {of_case: prepare(weights[of_case], of_case, config.backend, config.weight_dtype)}
                state = busy_state(case, of_case, config, options.seed)
                program = make_step(weights[of_case], of_case, config)
                bench = Bench(case, config, state, program, steps, model=of_case, pools=pools)
            records[index]["backend"] = None if what == "scheduler" else config.backend
            made[index] = bench
            benches.append(bench)
        except ValueError as error:
            records[index]["reason"] = str(error)
        except Exception as error:  # compilers raise all kinds; the other cases are still measured
            records[index] |= {"status": "failed", "reason": first_line(error)}
    for _ in range(options.repeats):
        for bench in benches:
            bench.take_sample()
    for index, bench in made.items():
        records[index] |= {"status": "timed"} | times(bench.timing())
    yield from records


def _record(what: str, case: Case, steps: int) -> Record:
    return {
        "kind": "measurement",
        "sweep": case.sweep,
        "what": what,
        "series": case.series,
        "value": case.value,
        "slots": case.slots,
        "slots_in_use": len(case.lengths),
        "num_tokens": sum(case.lengths),
        "max_model_len": case.max_model_len,
        "num_pages": case.num_pages,
        "num_rows": case.queue_size,
        "waiting": case.waiting,
        "turnover": case.turnover,
        "vocab_size": case.vocab_size,
        "steps_per_call": steps,
        "backend": None,
        "status": "left out",
        "reason": None,
        **dict.fromkeys(("median_us", "min_us", "p90_us", "one_call_us", "iterations")),
    }


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Fits y = a + b x so that the sum of squares of (a + b x - y) / y is least.

    Returns:
      a, b, and the largest |a + b x - y| / y.
    """
    values, costs = np.asarray(x, float), np.asarray(y, float)
    terms = np.stack([np.ones_like(values), values], axis=1) / costs[:, None]
    (a, b), *_ = np.linalg.lstsq(terms, np.ones_like(costs), rcond=None)
    return float(a), float(b), float(np.max(np.abs((a + b * values - costs) / costs)))


def fits_of(name: str, what: str, records: list[Record]) -> Iterator[Record]:
    """Fits a line to each series of a sweep, without points whose noise made their time negative, and yields its record."""
    timed = [
        record
        for record in records
        if (record["sweep"], record["what"], record["status"]) == (name, what, "timed") and record["median_us"] > 0
    ]
    for series in dict.fromkeys(record["series"] for record in timed):
        points = [(record["value"], record["median_us"]) for record in timed if record["series"] == series]
        if len({value for value, _ in points}) < 2:
            continue
        values, costs = zip(*points, strict=True)
        size, unit = SWEEPS[name].unit
        constant, slope, residual = fit_line([value / size for value in values], costs)
        yield {
            "kind": "fit",
            "sweep": name,
            "what": what,
            "series": series,
            "us_per_step": rounded(constant),
            "us_per_unit": rounded(slope),
            "unit": unit,
            "largest_relative_residual": rounded(residual),
            "first": values[0],
            "last": values[-1],
            "cost_of_last_to_first": rounded(costs[-1] / costs[0]),
            "should_be_flat": SWEEPS[name].flat and what == "scheduler",
        }
    if name == "long" and what == "step":
        yield from _long_to_even(timed)


def _long_to_even(timed: list[Record]) -> Iterator[Record]:
    """Yields the ratio of the cost of one long sequence among short ones to that of as many tokens evenly spread."""
    costs = {(record["series"], record["value"]): record["median_us"] for record in timed}
    for value in sorted({value for _, value in costs}):
        if {("one long", value), ("even", value)} <= costs.keys():
            ratio = rounded(costs["one long", value] / costs["even", value])
            yield {"kind": "ratio", "sweep": "long", "what": "step", "value": value, "one_long_to_even": ratio}


def describe_fit(fit: Record) -> str:
    """Returns the line that is printed for a fit or a ratio."""
    if fit["kind"] == "ratio":
        ratio = factor(fit["one_long_to_even"])
        return f"one sequence of {fit['value']} tokens among short ones: {ratio} of as many spread evenly"
    name = " ".join(filter(None, (fit["what"], fit["sweep"], fit["series"])))
    text = (
        f"{name}: {fit['us_per_step']:.3g} us + {fit['us_per_unit']:.3g} us per {fit['unit']} (worst point "
        f"{100 * fit['largest_relative_residual']:.0f}% off); {fit['cost_of_last_to_first']:.3g}x from {fit['first']} to "
        f"{fit['last']}"
    )
    return text + (", should be flat" if fit["should_be_flat"] else "")


def _print(table: Table, record: Record) -> None:
    if record["status"] != "timed":
        print(
            f"  {record['what']} {record['sweep']} {record['value']} {record['status']}: {record['reason']}", flush=True
        )
        return
    cells = {name: record[name] for name in ("sweep", "what", "series", "value")}
    costs = {"us/step": record["median_us"], "min": record["min_us"], "p90": record["p90_us"]}
    table.print_row(cells | costs | {"tokens": record["num_tokens"], "pages": record["num_pages"]})


def _panels(records: list[Record]) -> list[Panel]:
    timed = [record for record in records if record["status"] == "timed" and record["median_us"] > 0]
    panels = []
    for name in dict.fromkeys(record["sweep"] for record in timed):
        points: dict[str, list[tuple[float, float]]] = {}
        for record in timed:
            if record["sweep"] == name:
                label = " ".join(filter(None, (record["what"], record["series"])))
                points.setdefault(label, []).append((record["value"], record["median_us"]))
        lines = [Line(label, [x for x, _ in pairs], [y for _, y in pairs]) for label, pairs in points.items()]
        panels.append(Panel(name, name, "us per step", lines, log_x=True, log_y=True))
    return panels


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
