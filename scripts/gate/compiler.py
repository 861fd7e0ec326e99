"""Compiles programs for accelerators that this machine does not have, and reports on the results, for `compile_gate`.

XLA's plugins for NVIDIA GPUs and TPUs compile ahead of time, from a description of the target alone. The descriptions of GPUs
are in `configs/targets/`. On a machine with a GPU, XLA writes one into every dump (`--xla_dump_to`), as
`*.gpu_target_config.pbtxt`.

Without a GPU XLA tunes nothing: products become Triton fusions of a default shape. So the gate looks at the kernels of this
repository, at copies, and at the launch list, but not at the speed of the rest. With a GPU, XLA makes large sorts calls of CUB,
which no command buffer can hold. Without one it does not, so the gate looks for large sorts in the HLO.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from gate.dump import Kernel, Launches, jax_triton_kernels, large_sorts, pool_copies, read_dump
from jax.experimental import topologies

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "targets"
# Packages that the gate needs beside the CUDA plugin of jaxlib's version, by version of JAX. --no-deps leaves the toolkit out.
PACKAGES = {
    "0.10": ("libtpu==0.0.42.*", "jax-triton==0.3.1", "triton==3.9.*"),
    "0.11": ("libtpu==0.0.48.*", "jax-triton==0.4.1", "triton==3.7.*"),
}
_MODULES = {
    "cuda": {"jax_plugins.xla_cuda13": "jax-cuda13-plugin", "triton": "triton", "jax_triton": "jax-triton"},
    "tpu": {"libtpu": "libtpu"},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      name: its key in `TARGETS`.
      platform: "cuda" or "tpu".
      topology: the plugin's name of the smallest arrangement of devices.
      architecture: its name in ptxas; empty for TPUs.
    """

    name: str
    platform: str
    topology: str
    architecture: str = ""

    @property
    def description(self) -> str:
        """The description of a GPU that the compiler reads."""
        return (CONFIGS / f"{self.name}.textproto").read_text(encoding="utf-8")

    @property
    def compute_capability(self) -> int:
        """The compute capability of a GPU, times ten."""
        return int(re.sub(r"\D", "", self.architecture))

    @property
    def shared_memory_limit(self) -> int:
        """The most shared memory, in bytes, that a block of a kernel on a GPU may have."""
        limit = re.search(r"shared_memory_per_block_optin: (\d+)", self.description)
        assert limit is not None
        return int(limit[1])


TARGETS = {
    target.name: target
    for target in (
        Target("h200", "cuda", "1x1x1", "sm_90a"),
        Target("a100", "cuda", "1x1x1", "sm_80"),
        Target("tpu_v5e", "tpu", "v5e:2x2"),
        Target("tpu_v6e", "tpu", "v6e:2x2"),
    )
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, and the properties that the gate checks.

    Attributes:
      name: unique among the programs.
      function: the jitted function, with its donation and its compiler options.
      args: its arguments, as pytrees of `jax.ShapeDtypeStruct`.
      pool: one array of the KV pool, of a shape that nothing else has; None: nothing is checked for copies.
      num_written: how many arrays of that shape the function returns, which must be written in place.
      one_command_buffer: whether everything must be in one command buffer.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    pool: jax.ShapeDtypeStruct | None = None
    num_written: int = 0
    one_command_buffer: bool = False

    @property
    def pool_bytes(self) -> int:
        """The size of one array of the pool."""
        return 0 if self.pool is None else self.pool.size * self.pool.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compiling a program. `kernels` and `launches` are for GPUs only."""

    target: str
    program: str
    seconds: float  # for lowering and compiling
    kernels: tuple[Kernel, ...]
    launches: Launches | None
    pool_copies: tuple[str, ...]  # instructions that make another array of the pool's shape
    large_sorts: tuple[str, ...]  # results of sorts that would be calls of CUB on a GPU
    temp_bytes: int
    alias_bytes: int  # results that are arguments written in place


def missing_packages(platform: str) -> list[str]:
    """Returns the packages that compiling for a platform needs and that are not installed."""
    return [package for module, package in _MODULES[platform].items() if not _is_installed(module)]


def requirements() -> list[str]:
    """Returns the packages to install in addition to the jaxlib of this interpreter, in the notation of pip.

    Raises:
      ValueError: if the gate is not known to work with this version of JAX.
    """
    version = importlib.metadata.version("jaxlib")
    minor = ".".join(version.split(".")[:2])
    if minor not in PACKAGES:
        raise ValueError(f"jaxlib {version} is not known to the gate: install one of {', '.join(PACKAGES)}")
    return [f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}", *PACKAGES[minor]]


def compile_program(program: Program, target: Target) -> Report:
    """Compiles a program for a target.

    Raises:
      ValueError: if packages are missing; the message says how to install them.
      jax.errors.JaxRuntimeError, and any exception of lowering: if the program does not compile.
    """
    device = _device(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), program.args)
    with tempfile.TemporaryDirectory() as folder, jax.default_device(device), _uncached(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}
        start = time.perf_counter()
        lowered = program.function.trace(*args).lower()
        compiled = lowered.compile(compiler_options=dump if target.platform == "cuda" else None)
        seconds = time.perf_counter() - start
        text = compiled.as_text()
        kernels, launches = (), None
        if target.platform == "cuda":
            kernels, launches = read_dump(pathlib.Path(folder), text, target.architecture)
            kernels += jax_triton_kernels(lowered.compiler_ir(), pathlib.Path(folder), target.architecture)
    memory = compiled.memory_analysis()
    return Report(
        target=target.name,
        program=program.name,
        seconds=seconds,
        kernels=kernels,
        launches=launches,
        pool_copies=() if program.pool is None else tuple(pool_copies(text, program.pool.shape)),
        large_sorts=tuple(large_sorts(text)),
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
    )


def faults(report: Report, program: Program, target: Target) -> list[str]:
    """Returns the faults of a compiled program, a sentence for each."""
    sentences = []
    for kernel in report.kernels:
        if kernel.spill_store_bytes or kernel.spill_load_bytes:
            spilled = f"{kernel.spill_store_bytes} bytes to local memory and loads {kernel.spill_load_bytes}"
            sentences.append(f"{kernel.name} spills {spilled} per thread")
        sentences += [f"{kernel.name}: {loss}" for loss in kernel.losses]
        if kernel.shared_memory_bytes > target.shared_memory_limit:
            size = f"{kernel.shared_memory_bytes} bytes of shared memory"
            sentences.append(f"{kernel.name} asks for {size}, of {target.shared_memory_limit}")
    sentences += [f"the pool is copied or worked on as a whole: {copy}" for copy in report.pool_copies]
    written = program.num_written * program.pool_bytes
    if report.alias_bytes < written:
        sentences.append(f"only {report.alias_bytes} bytes are written in place, of a pool of {written}")
    if program.num_written and report.temp_bytes >= program.pool_bytes:
        sentences.append(f"{report.temp_bytes} bytes of temporaries have room for an array of the pool")
    if program.one_command_buffer and report.launches:
        sentences += _splits(report.launches, report.large_sorts)
    return sentences


def _splits(launches: Launches, large_sorts: tuple[str, ...]) -> Iterator[str]:
    """Yields the reasons why a program would not be one command buffer."""
    if not launches.one_command_buffer:
        outside = ", ".join(f"{number} {kind}" for kind, number in launches.outside.items()) or "nothing"
        yield f"there are {launches.num_command_buffers} command buffers, and outside of them {outside}"
    for kind in large_sorts:
        yield f"the sort that yields {kind} would be a call of CUB, outside of the command buffer"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _device(target: Target) -> Any:
    if missing := missing_packages(target.platform):
        raise ValueError(
            f"target {target.name} needs {', '.join(missing)}, not installed here: "
            f"pip install --no-deps {' '.join(map(repr, requirements()))}"
        )
    options = {}
    if target.platform == "cuda":
        options = {"target_config": target.description, "topology": target.topology}
    name = "" if target.platform == "cuda" else target.topology
    return topologies.get_topology_desc(name, target.platform, **options).devices[0]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of the persistent compilation cache, because JAX cannot load programs that no device here can run."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)
