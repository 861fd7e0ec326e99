"""Measures the time from nothing to the first token in fresh processes: import, load, compile, generate.

    python scripts/benchmark_startup.py
    python scripts/benchmark_startup.py --model configs/models/llama-135m.json --max_model_len 512 --json startup.jsonl

    first     no caches at all: native kernels are built, programs compiled
    cold      native kernels were built before; no compiled programs
    cached    JAX's persistent cache has the programs of the cold start, as the command line keeps them

Each repeat is one start of each kind, in this order, with caches of its own. Files come from the system's page cache. Without
--model the demo model starts; a config.json file gets random weights. The table has seconds for each phase (the column "import"
is jax and jaxserve together), and how many of the compiled programs came from a cache.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from lib.command import run_command
from lib.engine_options import BENCHMARK, EngineOptions, define_engine_flags, fitted_options, load_model
from lib.flag_values import options_from_flags
from lib.records import Record, outputs, provenance, rounded
from lib.table import Table

from jaxserve import DEMO_MODEL
from jaxserve.models import checkpoint

STARTS = ("first", "cold", "cached")
# Each phase lasts from the end of the one before.
PHASES = ("python", "jax", "jaxserve", "load", "compile", "first_token")
_CHILD = pathlib.Path(__file__).parent / "startup" / "child.py"
_METHOD = (
    "fresh processes, kinds of start in turns; seconds from the spawn of the process: python: to its first line; jax and "
    "jaxserve: imports; load: Engine made, weights and pool there; compile: warm_up; first_token: of one prompt; medians"
)
_COLUMNS = {"start": 7} | dict.fromkeys(PHASES, 11) | {"import": 8, "total": 8, "min": 8, "max": 8, "programs": 10}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    engine: EngineOptions
    prompt_len: int
    repeats: int
    timeout_s: int
    json: str | None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    define_engine_flags(values)
    to: dict[str, Any] = {"flag_values": values, "module_name": BENCHMARK}
    flags.DEFINE_integer("prompt_len", 16, "Tokens of the prompt.", lower_bound=1, **to)
    flags.DEFINE_integer("repeats", 3, "Starts of each kind.", lower_bound=1, **to)
    flags.DEFINE_integer("timeout_s", 600, "Seconds that a start may take at most.", lower_bound=1, **to)
    flags.DEFINE_string("json", None, "Write the records as JSON lines to this file.", **to)


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid, or has no effect.
    """
    if values["compilation_cache_dir"].present:
        raise ValueError("--compilation_cache_dir has no effect: each repeat has caches of its own; leave it out")
    engine = fitted_options(values)
    model, _ = load_model(engine)
    longest = min(engine.config.max_sequence_len, model.max_position)
    if values.prompt_len + 2 > longest:
        raise ValueError(
            f"--prompt_len={values.prompt_len} leaves no room in sequences of {longest} tokens: lower it, or raise "
            "--max_model_len"
        )
    path = engine.model or DEMO_MODEL
    if engine.load_format != "dummy":
        path = str(checkpoint.resolve_model(path))  # the children have other caches and would not find it
    return options_from_flags(Options, values, engine=dataclasses.replace(engine, model=os.path.abspath(path)))


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _run(parse_options(values), values.model or "demo"))


def _run(options: Options, name: str) -> int:
    common: Record = {
        "model": name,
        "dtype": options.engine.dtype,
        "load_format": options.engine.load_format,
        "config": dataclasses.asdict(options.engine.config),
        "prompt_len": options.prompt_len,
        "repeats": options.repeats,
        **provenance(_METHOD, options.engine.seed),
    }
    with outputs(None, options.json, lambda: common) as write:
        print(f"{common['device']}, {name} in {options.engine.dtype}; seconds, medians of {options.repeats}")
        runs_of: dict[str, list[Record]] = {start: [] for start in STARTS}
        for _ in range(options.repeats):
            for start, answer in starts(options):
                runs_of[start].append(answer)
        table = Table(_COLUMNS)
        for start, runs in runs_of.items():
            record = {"start": start, **summarize(runs)}
            write(record)
            table.print_row(_cells(record))
    return 0


def starts(options: Options) -> Iterator[tuple[str, Record]]:
    """Makes one start of each kind, in the order in which each finds the right caches; yields the kind and the answer."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {start: os.path.join(folder, "first" if start == "first" else "later") for start in STARTS}
        for start in STARTS:
            yield start, spawn(options, {"XDG_CACHE_HOME": folder}, caches[start])


def spawn(options: Options, environment: Mapping[str, str], compilation_cache_dir: str) -> Record:
    """Starts a process and returns its answer, with its times counted from the spawn.

    Raises:
      RuntimeError: if the process fails, or takes too long.
    """
    settings = dataclasses.asdict(options.engine) | {
        "prompt_len": options.prompt_len,
        "compilation_cache_dir": compilation_cache_dir,
    }
    path = [str(_CHILD.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    begin = time.time()
    try:
        done = subprocess.run(
            [sys.executable, str(_CHILD), json.dumps(settings)],
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=options.timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a start took more than --timeout_s={options.timeout_s}: raise it") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"a start failed: {lines[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["stamps"] = {phase: answer["stamps"][phase] - begin for phase in PHASES}
    return answer


def summarize(runs: Sequence[Record]) -> Record:
    """Returns the medians of the phases and of the total, which is not the sum of the phases' medians."""
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for run in runs:
        before = 0.0
        for phase in PHASES:
            seconds[phase].append(run["stamps"][phase] - before)
            before = run["stamps"][phase]
    totals = [run["stamps"][PHASES[-1]] for run in runs]
    return {
        **{f"{phase}_s": rounded(statistics.median(values)) for phase, values in seconds.items()},
        "import_s": rounded(statistics.median(map(sum, zip(seconds["jax"], seconds["jaxserve"], strict=True)))),
        "total_s": rounded(statistics.median(totals)),
        "total_min_s": rounded(min(totals)),
        "total_max_s": rounded(max(totals)),
        "backend": runs[-1]["backend"],
        "programs": runs[-1]["programs"],
        "programs_from_cache": runs[-1]["programs_from_cache"],
        "peak_rss_mb": rounded(statistics.median(run["peak_rss_bytes"] for run in runs) / 1e6),
    }


def _cells(record: Record) -> Record:
    cells = {"start": record["start"]} | {phase: record[f"{phase}_s"] for phase in (*PHASES, "import", "total")}
    programs = f"{record['programs_from_cache']} of {record['programs']}"
    return cells | {"min": record["total_min_s"], "max": record["total_max_s"], "programs": programs}


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
