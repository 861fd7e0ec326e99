"""Measures the gain of continuous batching and of paging: static against continuous batching, reserved against paged memory.

    python scripts/benchmark_static_vs_continuous.py --model configs/models/llama-135m.json --json out.jsonl --plot out.png

Three questions, over output lengths from all alike to heavy-tailed:
  batching  one engine, all slots with room for the longest sequence: static batches against continuous batching
  paging    the same bytes of keys and values (--pool_share of the above), continuous batching: as many slots as fit when each
            reserves the longest sequence, against all slots on pages
  both      static batches on reserved memory against continuous batching on pages

Engine and weights are the same, and all requests wait from the beginning. Contenders take turns; times are medians, and
ratios of times are medians over pairs of runs. Steps, occupancy and memory are counted, not timed. The exit status is 1 if
static and continuous batching gave different tokens. --helpfull lists the flags of the engine and the workload too.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from batching import report, runs
from batching.runs import DISTRIBUTIONS, Contender
from lib import workloads
from lib.command import run_command
from lib.engine_options import EngineOptions, define_engine_flags, fitted_options, load_model, make_warm_engine
from lib.flag_values import names, options_from_flags
from lib.plot import check_plot
from lib.records import outputs, provenance, rounded
from lib.table import Table

from jaxserve import timeline
from jaxserve.commands import flags as cli

_METHOD = (
    "one engine fed batch by batch or all at once; contenders in turns, medians, ratios of pairs; steps, slots and pages as "
    "counted on the device; live tokens and sequences in flight while any request waits"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    distributions: tuple[str, ...]
    repeats: int
    memory: bool
    pool_share: float
    json: str | None
    plot: str | None
    timeline: str | None
    seed: int


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list(
        "distributions",
        [name for name in DISTRIBUTIONS if name != "workload"],
        f"Distributions of output lengths, or all: {', '.join(DISTRIBUTIONS)} (as --output_lengths or the file says).",
        **to,
    )
    flags.DEFINE_integer("repeats", 3, "Timed runs of each contender.", lower_bound=1, **to)
    flags.DEFINE_boolean("memory", True, "Compare reserved with paged memory too.", **to)
    flags.DEFINE_float(
        "pool_share",
        0.25,
        "Size of the pool for the comparison of memory, as a share of the longest sequence in all slots.",
        **to,
    )
    flags.DEFINE_string("json", None, "Write the measurements to this file, as JSON lines.", **to)
    flags.DEFINE_string("plot", None, "Draw the measurements into this file: .png, .svg or .pdf.", **to)
    cli.define_timeline_flag(values)
    define_engine_flags(values)
    workloads.define_flags(values, num_requests=128)


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid, or has no effect beside the others.
    """
    distributions = names("distributions", values.distributions, DISTRIBUTIONS)
    if values["output_lengths"].present and "workload" not in distributions:
        raise ValueError("--output_lengths has no effect: add workload to --distributions, or name what you want there")
    if not 0 < values.pool_share < 1:
        raise ValueError(f"--pool_share={values.pool_share} must lie between 0 and 1")
    if not values.memory and values["pool_share"].present:
        raise ValueError("--pool_share has no effect on --nomemory: leave it out")
    if values.timeline is not None:
        timeline.check_path(values.timeline)
    check_plot(values.plot)
    return options_from_flags(Options, values, distributions=distributions)


def make_workloads(options: Options, values: flags.FlagValues, engine: EngineOptions) -> dict[str, workloads.Workload]:
    """Makes a workload for each distribution: the same prompts with other output lengths."""
    model, tokenizer = load_model(engine)
    base = workloads.workload_from_flags(values, model.vocab_size, tokenizer)
    made = {}
    for name in options.distributions:
        lengths = base.output_lengths
        if name != "workload":
            rng = np.random.default_rng([options.seed, DISTRIBUTIONS.index(name)])
            lengths = runs.draw_outputs(name, values.shortest_output, values.longest_output, len(base), rng)
        made[name] = workloads.Workload(base.prompts, lengths)
    return made


def batching_contenders(options: EngineOptions) -> list[Contender]:
    """Makes the contenders of one engine with room for all slots."""
    engine = make_warm_engine(options)
    return [
        Contender("static", engine, engine.config.max_slots),
        Contender("continuous", engine, None),
    ]


def num_reserved_slots(pool_share: float, max_slots: int) -> int:
    """Returns how many sequences the smaller pool has room for when each reserves the longest one.

    Raises:
      ValueError: if it has room for none.
    """
    num_slots = int(pool_share * max_slots)
    if not num_slots:
        raise ValueError(
            f"--pool_share={pool_share} of {max_slots} slots holds no longest sequence: raise it, or --max_slots"
        )
    return num_slots


def memory_contenders(options: EngineOptions, num_reserved: int) -> list[Contender]:
    """Makes engines with the same pool: `num_reserved` slots with room for the longest sequence each, and all slots."""
    config = options.config
    num_pages = num_reserved * config.pages_per_slot
    few, many = (
        make_warm_engine(
            dataclasses.replace(options, config=dataclasses.replace(config, max_slots=slots, num_pages=num_pages))
        )
        for slots in (num_reserved, config.max_slots)
    )
    return [
        Contender("static, reserved", few, num_reserved, reserved=True),
        Contender("continuous, reserved", few, None, reserved=True),
        Contender("continuous, paged", many, None),
    ]


def measure(
    part: str, table: Table, contenders: list[Contender], made: dict[str, workloads.Workload], options: Options
) -> Iterator[dict[str, Any]]:
    """Measures one part and yields a record per contender and distribution; the table compares all with the first contender."""
    for name, workload in made.items():
        runs_of_each = runs.compare(contenders, workload, options.repeats)
        pairs = list(zip(contenders, runs_of_each, strict=True))
        records = []
        for contender, own in pairs:
            tokens = next(others[0].token_ids for other, others in pairs if other.engine is contender.engine)
            over = {other.name: runs.ratios(own, base) for other, base in pairs if other is not contender}
            records.append(
                {
                    "benchmark": "static_vs_continuous",
                    "part": part,
                    "distribution": name,
                    "contender": contender.name,
                    "requests": len(workload),
                    "prompt_tokens": workload.num_prompt_tokens,
                    "output_tokens": workload.num_output_tokens,
                    "mean_output": workload.num_output_tokens / len(workload),
                    "longest_output": max(workload.output_lengths),
                    **runs.measures(contender, own, workload),
                    "over": over,
                    **runs.padding(workload, contender.engine.config.max_slots),
                    "tokens_equal": all(run.token_ids == tokens for run in own),
                    "repeats": options.repeats,
                }
            )
            if options.timeline is not None and name == options.distributions[0]:
                timeline.save_timeline(own[-1].timeline, report.timeline_path(options.timeline, contender.name))
        report.print_rows(table, records)
        yield from records


def run(options: Options, values: flags.FlagValues) -> int:
    """Measures, prints and writes; returns the exit status.

    Raises:
      ValueError: if the model, the workload or a file is not valid.
    """
    engine = fitted_options(values)
    made = make_workloads(options, values, engine)
    longest = max(workload.longest for workload in made.values())
    engine = fitted_options(values, max_model_len=longest)
    if engine.config.max_sequence_len < longest:
        raise ValueError(
            f"max_model_len={engine.config.max_sequence_len} is shorter than the longest sequence of the workload, {longest} "
            "tokens: leave it out, or lower --longest_prompt and --longest_output"
        )
    if values.num_requests <= engine.config.max_slots:
        raise ValueError(
            f"--num_requests={values.num_requests} must be above max_slots={engine.config.max_slots}: else all run at once"
        )
    if options.memory and engine.config.num_pages is not None:
        raise ValueError(
            f"num_pages={engine.config.num_pages} has no effect on what is compared: use --pool_share, or --nomemory"
        )
    about = workloads.describe_workload(values)
    about.pop("output_lengths", None)  # each record has its own
    common = {
        "model": engine.model or "demo",
        "dtype": engine.dtype,
        "workload": about,
        **provenance(_METHOD, options.seed),
    }
    parts: dict[str, Callable[[], list[Contender]]] = {"batching": lambda: batching_contenders(engine)}
    if options.memory:
        num_reserved = num_reserved_slots(options.pool_share, engine.config.max_slots)
        parts["memory"] = lambda: memory_contenders(engine, num_reserved)
    records = []
    with outputs(None, options.json, lambda: common) as write:
        report.print_about(common, len(next(iter(made.values()))), longest)
        for part, make in parts.items():
            contenders = make()
            table = report.start_table(part)
            for record in measure(part, table, contenders, made, options):
                write(_rounded(record))
                records.append(record)
            del contenders
            gc.collect()  # frees the engines before the next ones are made
    report.print_verdict(records)
    if options.plot is not None:
        report.plot(records, options.plot)
    return 0 if all(record["tokens_equal"] for record in records) else 1


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with four digits of each number that is not an integer."""
    rules = {float: rounded, dict: _rounded}
    return {name: rules.get(type(value), lambda value: value)(value) for name, value in record.items()}


def main(argv: Sequence[str]) -> int:
    """Runs the command with the flags that absl has parsed; returns its exit status."""
    return run_command(argv, lambda: run(parse_options(flags.FLAGS), flags.FLAGS))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
