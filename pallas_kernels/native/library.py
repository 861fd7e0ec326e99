"""Builds the C++ kernels of this folder on first use, on the machine they run on, and registers them with XLA.

The library lies in the user's cache folder. Its name is a digest of sources, flags, compiler, processor and jaxlib. Without a
compiler or a fitting processor there is no library, and the backend "reference" serves.
"""

import ctypes
import functools
import hashlib
import importlib.resources
import logging
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import tempfile

import jax
import jaxlib.version

_log = logging.getLogger(__name__)

TARGETS = (
    "jaxserve_embed",
    "jaxserve_product",
    "jaxserve_blocks",
    "jaxserve_rotary_write",
    "jaxserve_paged_attention",
    "jaxserve_choose",
    "jaxserve_report",
)
_SOURCES = ("blocks.cc", "product.cc", "paged_attention.cc", "sampling.cc")
_HEADERS = ("attention.h", "buffers.h", "pages.h", "parallel.h", "product.h", "rotary.h", "vector.h", "weights.h")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fPIC", "-shared", "-pthread", "-Wno-psabi"),
)
_PROCESSOR_NEEDS = ("avx2", "fma")
_BUILD_SECONDS = 600
_DIGEST_BYTES = 32


class NativeUnavailableError(RuntimeError):
    """Raised where the kernels cannot be built or loaded; the message says why."""


@functools.cache
def why_not() -> str | None:
    """Loads the library, and builds it if necessary. Returns None if that worked, else the reason why it did not."""
    try:
        _register(_load())
    except NativeUnavailableError as error:
        _log.info("native CPU kernels: not available: %s; plain JAX serves", error)
        return str(error)
    return None


def available() -> bool:
    """Returns whether the kernels can run here."""
    return why_not() is None


def _load() -> ctypes.CDLL:
    processor = _processor()
    missing = [name for name in _PROCESSOR_NEEDS if name not in processor]
    if missing:
        raise NativeUnavailableError(f"the processor lacks {' and '.join(missing)}")
    folder = _cache_folder()
    compiler = _compiler()
    with importlib.resources.as_file(importlib.resources.files("pallas_kernels.native")) as sources:
        texts = [(sources / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
        parts = [
            *texts,
            *(text.encode() for text in (*_FLAGS, *compiler, *sorted(processor), jaxlib.version.__version__)),
        ]
        name = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:20]
        library = folder / f"native-{name}.so"
        try:
            if not _is_whole(library):
                _build(compiler[0], [sources / source for source in _SOURCES], library)
        except OSError as error:
            raise NativeUnavailableError(f"{folder} cannot be used: {error}") from None
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailableError(f"{library.name} cannot be loaded: {error}") from None
    _log.info("native CPU kernels: %s", library.name)
    return loaded


def _register(library: ctypes.CDLL) -> None:
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")


def _processor() -> frozenset[str]:
    """Returns the processor's features, as Linux names them. The set is empty on other systems and processors."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _compiler() -> tuple[str, str]:
    """Returns the path of a C++ compiler and the text that it prints about its version."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            try:
                version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if version.returncode == 0:
                return path, version.stdout
    raise NativeUnavailableError("no C++ compiler found: install g++ or set CXX")


def _cache_folder() -> pathlib.Path:
    """Returns the folder for libraries. Only its owner may write to it, because libraries in it are executed."""
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError as error:
        raise NativeUnavailableError(f"no place for the library: {error} Set XDG_CACHE_HOME") from None
    folder = base / "jaxserve"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise NativeUnavailableError(f"{folder} cannot be used: {error.strerror}") from None
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailableError(f"{folder} can be written to by others: make it yours alone")
    return folder


def _is_whole(library: pathlib.Path) -> bool:
    """Returns whether a library is complete, with its digest at the end. Loading an incomplete one would end the process."""
    content = library.read_bytes() if library.exists() else b""
    return content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest()


def _build(compiler: str, sources: list[pathlib.Path], library: pathlib.Path) -> None:
    """Compiles all sources at the same time, links them, and puts the library in its place as a whole."""
    _log.info("native CPU kernels: building %s, once", library.name)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        new = pathlib.Path(folder) / library.name
        objects = [new.with_name(source.stem + ".o") for source in sources]
        common = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
        try:
            running = [
                subprocess.Popen(
                    [*common[:-2], "-c", *common[-2:], str(source), "-o", str(target)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for source, target in zip(sources, objects, strict=True)
            ]
            printed = [process.communicate(timeout=_BUILD_SECONDS)[0] for process in running]
            if not any(process.returncode for process in running):
                linked = subprocess.run(
                    [*common, *map(str, objects), "-o", str(new)],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                if linked.returncode == 0:
                    new.write_bytes((code := new.read_bytes()) + hashlib.sha256(code).digest())
                    new.replace(library)  # two processes may build at once: each replaces the whole file
                    return
                printed.append(linked.stderr)
        except (OSError, subprocess.TimeoutExpired) as error:
            printed = [str(error)]
    tail = "; ".join("\n".join(printed).strip().splitlines()[:3])
    raise NativeUnavailableError(f"{compiler} failed: {tail}")
