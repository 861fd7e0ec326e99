"""Compiles every kernel and the engine's step for real GPUs and TPUs on a machine that has none, and reports the results.

    python scripts/compile_gate.py
    python scripts/compile_gate.py --targets=h200,a100 --programs='decode/*/bfloat16' --json=gate.jsonl
    pip install --no-deps $(python scripts/compile_gate.py --requirements)

It needs the packages of the compilers, in this environment or in one of their own; `--requirements` prints them for the
installed JAX. It prints a table of kernels and one of programs. The exit status is 1 if a program does not compile, a kernel
spills registers or needs too much shared memory, the pool is copied, or a part of a step is outside of its command buffer.
`scripts/gate/compiler.py` explains the method, `pallas_kernels/README.md` the results.
"""

import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from absl import app, flags
from gate.compiler import TARGETS, Program, Report, Target, compile_program, faults, requirements
from gate.dump import Kernel
from gate.programs import DTYPES, ENGINE_PROGRAMS, GPU_OPS, named_programs

from pallas_kernels.paged_attention.shapes import SHAPES

FLAGS = flags.FLAGS
flags.DEFINE_list("targets", list(TARGETS), "Devices to compile for.")
flags.DEFINE_list("programs", ["*/bfloat16", "step", "run_steps", "update"], "Names of programs, or patterns of them.")
flags.DEFINE_string("json", None, "Write a JSON line per program to this file.")
flags.DEFINE_bool("requirements", False, "Print the packages that the gate needs, and stop.")

KERNEL_COLUMNS = (
    "registers",
    "spill_store_bytes",
    "spill_load_bytes",
    "shared_memory_bytes",
    "num_warps",
    "num_stages",
)
LAUNCH_COLUMNS = (
    "num_kernels",
    "num_copies",
    "num_loops",
    "num_command_buffers",
    "num_host_loops",
    "num_outside",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a program: its report, unless it did not compile, and its faults."""

    target: str
    program: str
    report: Report | None
    faults: list[str]

    def as_json(self) -> str:
        fields = dataclasses.asdict(self.report) if self.report else {"target": self.target, "program": self.program}
        return json.dumps(fields | {"faults": self.faults})


def examine(program: Program, target: Target) -> Outcome:
    """Compiles a program and looks for faults. A program that does not compile has a fault, too."""
    try:
        report = compile_program(program, target)
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return Outcome(target.name, program.name, None, [f"{type(error).__name__}: {message[0][:200]}"])
    return Outcome(target.name, program.name, report, faults(report, program, target))


def kernel_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Returns a table row per kernel of GPU programs."""

    def row(report: Report, kernel: Kernel) -> dict[str, Any]:
        start = {"target": report.target, "program": report.program, "kernel": kernel.name}
        numbers = {name: getattr(kernel, name) for name in KERNEL_COLUMNS}
        return start | numbers | {"seconds": f"{report.seconds:.1f}"}

    return [row(outcome.report, kernel) for outcome in outcomes if outcome.report for kernel in outcome.report.kernels]


def program_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Returns a table row per program."""

    def row(outcome: Outcome) -> dict[str, Any]:
        start: dict[str, Any] = {"target": outcome.target, "program": outcome.program}
        if (report := outcome.report) is not None:
            launches = {name: getattr(report.launches, name, None) for name in LAUNCH_COLUMNS}
            memory = {"pool_copies": len(report.pool_copies), "temp_MB": f"{report.temp_bytes / 1e6:.1f}"}
            memory["alias_MB"] = f"{report.alias_bytes / 1e6:.1f}"
            start |= launches | memory | {"seconds": f"{report.seconds:.1f}"}
        return start | {"verdict": "; ".join(outcome.faults) or "ok"}

    return [row(outcome) for outcome in outcomes]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns table rows as aligned text. A missing value is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [["-" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def chosen(target: Target, patterns: Sequence[str]) -> list[Program]:
    """Returns the programs of a target whose names match a pattern.

    Raises:
      ValueError: if a pattern matches none.
    """
    programs = named_programs(target)
    names: dict[str, None] = {}
    for pattern in patterns:
        matching = fnmatch.filter(programs, pattern)
        if not matching:
            names_of_parts = "; ".join(", ".join(part) for part in (GPU_OPS, SHAPES, DTYPES))
            raise ValueError(
                f"--programs: {pattern!r} matches none for {target.name}: use operation/shape/dtype, of {names_of_parts}; "
                f"or {', '.join(ENGINE_PROGRAMS)}"
            )
        names |= dict.fromkeys(matching)
    return [programs[name]() for name in names]


def main(_: list[str]) -> None:
    if FLAGS.requirements:
        print("\n".join(requirements()))
        return
    if unknown := [name for name in FLAGS.targets if name not in TARGETS]:
        sys.exit(f"--targets: {', '.join(unknown)} unknown: use some of {', '.join(TARGETS)}")
    jax.config.update("jax_platforms", "cpu")
    try:
        cases = [
            (program, TARGETS[name]) for name in FLAGS.targets for program in chosen(TARGETS[name], FLAGS.programs)
        ]
    except ValueError as error:
        sys.exit(str(error))
    outcomes = []
    for program, target in cases:
        outcomes.append(examine(program, target))
        verdict = "; ".join(outcomes[-1].faults) or "ok"
        print(f"{target.name} {program.name}: {verdict}", file=sys.stderr, flush=True)
    if rows := kernel_rows(outcomes):
        print(table(rows), end="\n\n")
    print(table(program_rows(outcomes)))
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            file.writelines(outcome.as_json() + "\n" for outcome in outcomes)
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    app.run(main)
