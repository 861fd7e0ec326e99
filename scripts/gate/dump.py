"""Reads XLA's dump of a compiled program: optimized HLO, and for GPUs the PTX of kernels and the launch list.

The dumps of JAX 0.10 and 0.11 both contain:

- `*.ptx`, one file per kernel, which `ptxas -v` turns into registers and spills. Option `xla_dump_emitter_re="ptx"` asks for
  them; 0.10 dumps them anyway.
- `*.thunk_sequence_after_thunk_passes.txt`, the launch list: kernels with grid, threads and shared memory (which is not in the
  PTX, because Triton allocates it at launch), loops, and the command buffers (CUDA graphs) around them.
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
      name: the name of its entry point.
      registers: registers per thread.
      spill_store_bytes, spill_load_bytes: bytes per thread that go to and from local memory because registers ran out.
      shared_memory_bytes: shared memory per block.
      num_warps: warps per block.
      num_stages: stages of its software pipeline; None: several kernels of that name and number of warps differ in it, or the
        kernel is one of jax-triton's.
      grid: numbers of blocks.
      losses: the assembler's warnings about lost speed, for example that asynchronous products were serialised.
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
    """The launches of a program: operations that the host starts one by one, and those in command buffers.

    Attributes:
      num_kernels, num_copies, num_loops: numbers in the whole program; the body of a loop counts once.
      num_command_buffers: number of CUDA graphs.
      num_host_loops: number of loops whose condition the host reads back in each iteration.
      outside: numbers of the operations outside of command buffers, by kind.
    """

    num_kernels: int
    num_copies: int
    num_loops: int
    num_command_buffers: int
    num_host_loops: int
    outside: Mapping[str, int]

    @property
    def num_outside(self) -> int:
        """The number of operations that the host starts one by one."""
        return sum(self.outside.values())

    @property
    def one_command_buffer(self) -> bool:
        """Whether the host starts nothing but one command buffer."""
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
      architecture: the GPU architecture that ptxas assembles for.

    Raises:
      RuntimeError: if a file is missing from the dump, or ptxas fails.
    """
    lists = sorted(folder.glob("*.thunk_sequence*.txt"), key=lambda path: "after" in path.name)
    if not lists:
        raise RuntimeError("XLA has written no launch list")
    launches = list(_read_launches(lists[-1].read_text()))
    stages_by_name = _stages_of_kernels(hlo)
    names = {launch.name for launch in launches if re.sub(r"__\d+$", "", launch.name) in stages_by_name}
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
            stages = stages_by_name[re.sub(r"__\d+$", "", launch.name)].get(num_warps, set())
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
    enclosing_kinds: tuple[str, ...]  # kinds of the loops and command buffers around it, outermost first


def _stages_of_kernels(hlo: str) -> dict[str, dict[int, set[int]]]:
    """Returns the stages of the Pallas kernels in HLO, by name and warps. XLA adds "__1" to a name that is in use."""
    stages_by_name: dict[str, dict[int, set[int]]] = {}
    for line in hlo.splitlines():
        if 'custom_call_target="__gpu$xla.gpu.triton"' in line:
            fields = dict(re.findall(r'\b(name|num_warps|num_stages) = "?(\w+)', line))
            stages = stages_by_name.setdefault(fields["name"], {}).setdefault(int(fields["num_warps"]), set())
            stages.add(int(fields["num_stages"]))
    return stages_by_name


def _read_launches(text: str) -> Iterator[_Launch]:
    """Yields the launches in order. In the text, the parts of a loop or a command buffer are indented below it."""
    enclosing: list[tuple[int, str]] = []  # depth and kind of the lines that the current one is below
    for line in text.splitlines():
        match = re.match(r"( *)\d+: k(\w+) +\[.*?\] *(\S*)(.*)", line)
        if not match:
            continue
        indent, kind, name, details = match.groups()
        depth = len(indent)
        enclosing = [outer for outer in enclosing if outer[0] < depth]
        grid = re.search(r"grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+).*shared_memory: (\d+)", details)
        x, y, z, num_threads, shared_bytes = map(int, grid.groups()) if grid else (0, 0, 0, 0, 0)
        yield _Launch(kind, name, (x, y, z), num_threads, shared_bytes, tuple(outer[1] for outer in enclosing))
        enclosing.append((depth, kind))


def _summary(launches: list[_Launch]) -> Launches:
    kinds = collections.Counter(launch.kind for launch in launches)
    outside = [launch.kind for launch in launches if "CommandBuffer" not in (launch.kind, *launch.enclosing_kinds)]
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
    """Assembles the one kernel in a PTX file; returns its registers, spills and losses."""
    command = [_ptxas(), "-v", f"-arch={architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"ptxas: {process.stderr.strip()}")
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
    }
    matches = {name: re.search(pattern, process.stderr) for name, pattern in patterns.items()}
    if not all(matches.values()):
        raise RuntimeError(f"ptxas prints something unknown: {process.stderr}")
    losses = re.findall(r"Potential Performance Loss: (.*?)(?: in| for) the function '", process.stderr)
    return {name: int(match[1]) for name, match in matches.items() if match} | {"losses": tuple(losses)}


def pool_copies(hlo: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields the instructions of optimized HLO that make a new array of a shape, or change all of one.

    Other instructions pass a buffer on under a new name, or write a part of it in place: a scatter or a slice update, alone or
    in a fusion, or a kernel that aliases it. Where XLA copies a buffer before a write, there is an instruction for that; a
    fusion that copies or converts has other instructions in it.
    """
    shape_text = f"[{','.join(map(str, shape))}]"
    computations = _computations(hlo)
    names_of_fusions = {name for body in computations.values() for line in body if (name := _fusion_of(line))}
    for name, body in computations.items():
        if name in names_of_fusions:
            continue
        for line in body:
            kind, opcode = _kind_and_opcode(line)
            if shape_text not in kind or opcode in _PASSES_ON | _WRITES:
                continue
            if opcode == "fusion":
                fusion = map(_kind_and_opcode, computations[_fusion_of(line)])
                opcodes = {op for kind, op in fusion if shape_text in kind}
                if opcodes <= _PASSES_ON | _WRITES and opcodes & _WRITES:
                    continue
                opcode = f"fusion of {', '.join(sorted(opcodes - _PASSES_ON))}"
            if opcode == "custom-call" and kind.count(shape_text) <= _num_aliases(line):
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
    """Returns the lines of each computation by its name."""
    computations: dict[str, list[str]] = {}
    body: list[str] = []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?(\S+) .*\{$", line):
            body = computations.setdefault(header[1], [])
        elif line.startswith(" "):
            body.append(line)
    return computations


def _kind_and_opcode(line: str) -> tuple[str, str]:
    """Returns the result type (of a tuple in brackets) and the opcode of an instruction."""
    match = re.match(r" +(?:ROOT )?%?\S+ = (.*?) ([a-z-]+)\(", line)
    return (match[1], match[2]) if match else ("", "")


def _fusion_of(line: str) -> str:
    """Returns the name of the computation that a fusion calls; empty for other instructions."""
    match = re.search(r" fusion\(.*, calls=%?([^\s,]+)", line)
    return match[1] if match else ""


def _num_aliases(line: str) -> int:
    """Returns how many results of a custom call are operands written in place."""
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{", line))  # output_to_operand_aliasing={{0}: (5, {}), {1}: (6, {})}
