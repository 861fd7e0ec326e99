"""Reads what XLA writes about a compiled program: optimized HLO, and for GPUs the PTX of kernels and the launch list.

The dumps of JAX 0.10 and 0.11 both contain:

- `*.ptx`, one file per kernel, which `ptxas -v` turns into registers and spills. Option `xla_dump_emitter_re="ptx"` asks for
  them; 0.10 dumps them anyway.
- `*.thunk_sequence_after_thunk_passes.txt`, the launch list: kernels with grid, threads and shared memory (which Triton
  allocates at launch, so that the PTX does not tell), loops, and the command buffers (CUDA graphs) around them.
  It is missing if these passes changed nothing; then `*.thunk_sequence.txt`, the list before them, is the right one.
- the optimized HLO, in which a Pallas kernel is a custom call that names its warps and stages. `Compiled.as_text` has it too.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from gate.jax_triton_runs import compiled_kernels
from jax.extend.mlir import ir


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel of Pallas or of jax-triton.

    Attributes:
      name: of its entry point.
      registers: per thread.
      spill_store_bytes, spill_load_bytes: per thread, from and to local memory because registers ran out.
      shared_memory_bytes: per block.
      num_warps: per block.
      num_stages: of its software pipeline; None: several kernels of that name and number of warps differ in it, or it is one
        of jax-triton's.
      grid: blocks.
      losses: what makes it slower, in the words of the assembler; for example that asynchronous products were serialised.
    """

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_memory_bytes: int
    num_warps: int
    num_stages: int | None
    grid: tuple[int, int, int]
    losses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Launches:
    """The launches of a program: what the host starts by itself, or hands over as a command buffer.

    Attributes:
      num_kernels, num_copies, num_loops: in all, each body of a loop counted once.
      num_command_buffers: CUDA graphs.
      num_host_loops: loops whose test the host reads back each time round.
      outside: kinds of what the host starts one by one, with their numbers.
    """

    num_kernels: int
    num_copies: int
    num_loops: int
    num_command_buffers: int
    num_host_loops: int
    outside: Mapping[str, int]

    @property
    def num_outside(self) -> int:
        """How many things the host starts one by one."""
        return sum(self.outside.values())

    @property
    def one_command_buffer(self) -> bool:
        """Whether the host starts one thing only."""
        return self.num_command_buffers == 1 and not self.outside


def jax_triton_kernels(lowered: ir.Module, folder: pathlib.Path, architecture: str) -> tuple[Kernel, ...]:
    """Returns the kernels of a program that jax-triton has compiled, and writes their PTX to `folder`."""
    kernels = []
    for index, kernel in enumerate(compiled_kernels(lowered)):
        source = folder / f"jax_triton.{index}.ptx"
        source.write_text(kernel.ptx)
        kernels.append(
            Kernel(
                name=kernel.name,
                **_assemble(architecture, source),
                shared_memory_bytes=kernel.shared_memory_bytes,
                num_warps=kernel.num_warps,
                num_stages=None,
                grid=kernel.grid,
            )
        )
    return tuple(kernels)


def read_dump(folder: pathlib.Path, hlo: str, architecture: str) -> tuple[tuple[Kernel, ...], Launches]:
    """Returns the Pallas kernels of a program and its launch list.

    Args:
      folder: the compiler's dump.
      hlo: the optimized program.
      architecture: what ptxas assembles for.

    Raises:
      RuntimeError: if something is missing from the dump, or ptxas fails.
    """
    lists = sorted(folder.glob("*.thunk_sequence*.txt"), key=lambda path: "after" in path.name)
    if not lists:
        raise RuntimeError("XLA has written no launch list")
    launches = list(_read_launches(lists[-1].read_text()))
    declared = _declared_kernels(hlo)
    names = {launch.name for launch in launches if re.sub(r"__\d+$", "", launch.name) in declared}
    sources = {}
    for path in folder.glob("*.ptx"):
        entry = re.search(r"^\.visible \.entry (\w+)\(", path.read_text(), flags=re.MULTILINE)
        if entry and entry[1] in names:
            sources[entry[1]] = path
    if missing := names - sources.keys():
        raise RuntimeError(f"XLA has written no PTX of {', '.join(sorted(missing))}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        usages = dict(zip(sources, pool.map(functools.partial(_assemble, architecture), sources.values()), strict=True))
    kernels = {}
    for launch in launches:
        if launch.name in names:
            num_warps = launch.num_threads // 32
            stages = declared[re.sub(r"__\d+$", "", launch.name)].get(num_warps, set())
            kernels[launch.name] = Kernel(
                name=launch.name,
                **usages[launch.name],
                shared_memory_bytes=launch.shared_memory_bytes,
                num_warps=num_warps,
                num_stages=min(stages) if len(stages) == 1 else None,
                grid=launch.grid,
            )
    return tuple(kernels.values()), _summary(launches)


@dataclasses.dataclass(frozen=True)
class _Launch:
    kind: str
    name: str
    grid: tuple[int, int, int]
    num_threads: int
    shared_memory_bytes: int
    inside: tuple[str, ...]  # kinds of what it is part of, outermost first


def _declared_kernels(hlo: str) -> dict[str, dict[int, set[int]]]:
    """Returns the stages of the Pallas kernels in HLO, by name and warps. XLA adds "__1" to a name that is in use."""
    found: dict[str, dict[int, set[int]]] = {}
    for line in hlo.splitlines():
        if 'custom_call_target="__gpu$xla.gpu.triton"' in line:
            fields = dict(re.findall(r'\b(name|num_warps|num_stages) = "?(\w+)', line))
            stages = found.setdefault(fields["name"], {}).setdefault(int(fields["num_warps"]), set())
            stages.add(int(fields["num_stages"]))
    return found


def _read_launches(text: str) -> Iterator[_Launch]:
    """Yields the launches in order. In the text, the parts of a loop or a command buffer are indented below it."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)\d+: k(\w+) +\[.*?\] *(\S*)(.*)", line)
        if not found:
            continue
        depth = len(found[1])
        above = [outer for outer in above if outer[0] < depth]
        grid = re.search(r"grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+).*shared_memory: (\d+)", found[4])
        x, y, z, num_threads, shared = map(int, grid.groups()) if grid else (0, 0, 0, 0, 0)
        yield _Launch(found[2], found[3], (x, y, z), num_threads, shared, tuple(kind for _, kind in above))
        above.append((depth, found[2]))


def _summary(launches: list[_Launch]) -> Launches:
    kinds = collections.Counter(launch.kind for launch in launches)
    outside = [launch.kind for launch in launches if "CommandBuffer" not in (launch.kind, *launch.inside)]
    return Launches(
        num_kernels=kinds["CustomKernel"] + kinds["Kernel"],
        num_copies=kinds["Copy"],
        num_loops=kinds["While"],
        num_command_buffers=kinds["CommandBuffer"],
        num_host_loops=outside.count("While"),
        outside=dict(collections.Counter(outside)),
    )


@functools.cache
def _ptxas() -> str:
    """Returns the path of the assembler in triton's package, without importing triton, which would look for a GPU."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tools = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return str(next(tools / name for name in ("ptxas-blackwell", "ptxas") if (tools / name).exists()))


def _assemble(architecture: str, source: pathlib.Path) -> dict[str, Any]:
    """Returns what the assembler says about the one kernel in a PTX file."""
    command = [_ptxas(), "-v", f"-arch={architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip()}")
    numbers = {
        "registers": r"Used (\d+) registers",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
    }
    found = {name: re.search(pattern, done.stderr) for name, pattern in numbers.items()}
    if not all(found.values()):
        raise RuntimeError(f"ptxas prints something unknown: {done.stderr}")
    losses = re.findall(r"Potential Performance Loss: (.*?)(?: in| for) the function '", done.stderr)
    return {name: int(match[1]) for name, match in found.items() if match} | {"losses": tuple(losses)}


def pool_copies(hlo: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the instructions of optimized HLO that make a new array of a shape, or change all of one.

    Buffers are passed on by name, written by a scatter or a slice update, alone or as a fusion, and by kernels that alias
    them. XLA says so where it has to copy for a write; a fusion that copies or converts has other instructions in it.
    """
    wanted = f"[{','.join(map(str, shape))}]"
    computations = _computations(hlo)
    fused = {name for body in computations.values() for line in body if (name := _called(line))}
    for name, body in computations.items():
        if name in fused:
            continue
        for line in body:
            kind, opcode = _kind_and_opcode(line)
            if wanted not in kind or opcode in _PASSES_ON | _WRITES:
                continue
            if opcode == "fusion":
                inside = {op for kind, op in map(_kind_and_opcode, computations[_called(line)]) if wanted in kind}
                if inside <= _PASSES_ON | _WRITES and inside & _WRITES:
                    continue
                opcode = f"fusion of {', '.join(sorted(inside - _PASSES_ON))}"
            if opcode == "custom-call" and kind.count(wanted) <= _num_aliased(line):
                continue
            yield f"{opcode} in {name}"


def large_sorts(hlo: str) -> Iterator[str]:
    """Yields the result types of sorts that would be calls of CUB: of one array or a pair, with many elements."""
    for line in hlo.splitlines():
        kind, opcode = _kind_and_opcode(line)
        shapes = re.findall(r"\w+\[([\d,]*)\]", kind)
        if opcode == "sort" and len(shapes) <= 2 and math.prod(map(int, shapes[0].split(","))) > _MOST_SORTED_BY_XLA:
            yield re.sub(r"\{[\d,:T()]*\}", "", kind)


_MOST_SORTED_BY_XLA = 2**14  # elements; the smallest that XLA's sort_rewriter.cc gives to CUB on any GPU is about that
_PASSES_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call"}
_WRITES = {"scatter", "dynamic-update-slice"}


def _computations(hlo: str) -> dict[str, list[str]]:
    """Returns the lines of each computation."""
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?(\S+) .*\{$", line):
            body = found.setdefault(header[1], [])
        elif line.startswith(" "):
            body.append(line)
    return found


def _kind_and_opcode(line: str) -> tuple[str, str]:
    """Returns the result type (of a tuple in brackets) and the opcode of an instruction."""
    found = re.match(r" +(?:ROOT )?%?\S+ = (.*?) ([a-z-]+)\(", line)
    return (found[1], found[2]) if found else ("", "")


def _called(line: str) -> str:
    """Returns the computation that a fusion calls; empty for other instructions."""
    found = re.search(r" fusion\(.*, calls=%?([^\s,]+)", line)
    return found[1] if found else ""


def _num_aliased(line: str) -> int:
    """Returns how many results of a custom call are operands written in place."""
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{", line))  # output_to_operand_aliasing={{0}: (5, {}), {1}: (6, {})}
