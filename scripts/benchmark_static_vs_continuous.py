"""What continuous batching and paging buy: the same engine and weights, static against continuous, reserved against paged.

    python scripts/benchmark_static_vs_continuous.py --model configs/models/llama-135m.json --json out.jsonl --plot out.png

Three questions, over output lengths from all alike to heavy-tailed:
  batching  one engine, all slots with room for the longest sequence: static batches against continuous batching
  paging    the same bytes of keys and values (--pool_share of the above), continuous batching: as many slots as fit when each
            reserves the longest sequence, against all slots on pages
  both      static batches on reserved memory against continuous batching on pages

All requests are there from the beginning. Contenders take turns, medians; ratios of time are medians of pairs. Steps, occupancy
and memory are counted, not timed. Exit status 1 if static and continuous batching gave different tokens. --helpfull lists the
flags of engine and workload too.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from lib import batching, batching_report, workloads
from lib.batching import DISTRIBUTIONS, Contender
from lib.command import Table, names, run_command
from lib.engine_options import EngineOptions, define_engine_flags, fitted_options, load_model, make_warm_engine
from lib.plot import check_plot
from lib.report import outputs, provenance, rounded

from jaxserve import timeline
from jaxserve.commands import flags as cli

_METHOD = (
    "one engine fed batch by batch or all at once; contenders in turns, medians, ratios of pairs; steps, slots and pages as "
    "counted on the device; live tokens and sequences in flight while any request waits"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, checked."""

    distributions: tuple[str, ...]
    repeats: int
    memory: bool
    pool_share: float
    json: str | None
    plot: str | None
    timeline: str | None
    seed: int


def define_flags(values: flags.FlagValues) -> None:
    """All flags of the benchmark."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list(
        "distributions",
        [name for name in DISTRIBUTIONS if name != "workload"],
        f"Of output lengths: {', '.join(DISTRIBUTIONS)}; workload: as --output_lengths or the file says; or all.",
        **to,
    )
    flags.DEFINE_integer("repeats", 3, "Runs of each contender.", lower_bound=1, **to)
    flags.DEFINE_boolean("memory", True, "Compare reserved with paged memory too.", **to)
    flags.DEFINE_float("pool_share", 0.25, "Of the pool that gives all slots the longest sequence; for memory.", **to)
    flags.DEFINE_string("json", None, "Write the measurements to this file, as JSON lines.", **to)
    flags.DEFINE_string("plot", None, "Draw them into this file, .png, .svg or .pdf.", **to)
    cli.define_timeline_flag(values)
    define_engine_flags(values)
    workloads.define_flags(values, num_requests=128)


def parse_options(values: flags.FlagValues) -> Options:
    """Options from flags.

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
    return Options(
        distributions=distributions,
        repeats=values.repeats,
        memory=values.memory,
        pool_share=values.pool_share,
        json=values.json,
        plot=values.plot,
        timeline=values.timeline,
        seed=values.seed,
    )


def make_workloads(options: Options, values: flags.FlagValues, engine: EngineOptions) -> dict[str, workloads.Workload]:
    """The same prompts with outputs of each distribution."""
    model, tokenizer = load_model(engine)
    base = workloads.workload_from_flags(values, model.vocab_size, tokenizer)
    made = {}
    for name in options.distributions:
        lengths = base.output_lengths
        if name != "workload":
            rng = np.random.default_rng([options.seed, DISTRIBUTIONS.index(name)])
            lengths = batching.draw_outputs(name, values.shortest_output, values.longest_output, len(base), rng)
        made[name] = workloads.Workload(base.prompts, lengths)
    return made


def batching_contenders(options: EngineOptions) -> list[Contender]:
    """One engine with room for all slots."""
    engine = make_warm_engine(options)
    return [
        Contender("static", engine, engine.config.max_slots),
        Contender("continuous", engine, None),
    ]


def num_reserved_slots(pool_share: float, max_slots: int) -> int:
    """Sequences for which the smaller pool has room when each reserves the longest.

    Raises:
      ValueError: if there is none.
    """
    fitting = int(pool_share * max_slots)
    if not fitting:
        raise ValueError(
            f"--pool_share={pool_share} of {max_slots} slots holds no longest sequence: raise it, or --max_slots"
        )
    return fitting


def memory_contenders(options: EngineOptions, fitting: int) -> list[Contender]:
    """Engines with the same pool: `fitting` slots with room for the longest sequence each, and all slots."""
    config = options.config
    num_pages = fitting * config.pages_per_slot
    few, many = (
        make_warm_engine(
            dataclasses.replace(options, config=dataclasses.replace(config, max_slots=slots, num_pages=num_pages))
        )
        for slots in (fitting, config.max_slots)
    )
    return [
        Contender("static, reserved", few, fitting, reserved=True),
        Contender("continuous, reserved", few, None, reserved=True),
        Contender("continuous, paged", many, None),
    ]


def measure(
    part: str, table: Table, contenders: list[Contender], made: dict[str, workloads.Workload], options: Options
) -> Iterator[dict[str, Any]]:
    """A record for each contender and distribution; the first contender is what the table compares the others with."""
    for name, workload in made.items():
        runs = batching.compare(contenders, workload, options.repeats)
        pairs = list(zip(contenders, runs, strict=True))
        records = []
        for contender, own in pairs:
            tokens = next(runs[0].token_ids for other, runs in pairs if other.engine is contender.engine)
            over = {other.name: batching.ratios(own, base) for other, base in pairs if other is not contender}
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
                    **batching.measures(contender, own, workload),
                    "over": over,
                    **batching.padding(workload, contender.engine.config.max_slots),
                    "tokens_equal": all(run.token_ids == tokens for run in own),
                    "repeats": options.repeats,
                }
            )
            if options.timeline is not None and name == options.distributions[0]:
                timeline.save_timeline(
                    own[-1].timeline, batching_report.timeline_path(options.timeline, contender.name)
                )
        batching_report.print_rows(table, records)
        yield from records


def run(options: Options, values: flags.FlagValues) -> int:
    """Measures, prints, writes; returns the exit status.

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
        fitting = num_reserved_slots(options.pool_share, engine.config.max_slots)
        parts["memory"] = lambda: memory_contenders(engine, fitting)
    records = []
    with outputs(None, options.json, lambda: common) as write:
        batching_report.print_about(common, len(next(iter(made.values()))), longest)
        for part, make in parts.items():
            contenders = make()
            table = batching_report.start_table(part)
            for record in measure(part, table, contenders, made, options):
                write(_rounded(record))
                records.append(record)
            del contenders
            gc.collect()  # the engines, before the next ones are made
    batching_report.print_verdict(records)
    if options.plot is not None:
        batching_report.plot(records, options.plot)
    return 0 if all(record["tokens_equal"] for record in records) else 1


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """The record with four digits of each number that is not whole."""
    known = {float: rounded, dict: _rounded}
    return {name: known.get(type(value), lambda value: value)(value) for name, value in record.items()}


def main(argv: Sequence[str]) -> int:
    """Runs the command with the flags that absl has parsed; returns its exit status."""
    return run_command(argv, lambda: run(parse_options(flags.FLAGS), flags.FLAGS))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
