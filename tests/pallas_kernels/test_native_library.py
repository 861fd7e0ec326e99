"""The library of native kernels: errors name the obstacle, no incomplete file is loaded, other processors work."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

from jaxserve import EngineConfig
from pallas_kernels.backend import resolve_backend
from pallas_kernels.native import library
from tests.pallas_kernels import native_bits

available = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")


def test_only_a_missing_compiler_or_another_processor_excuses_missing_kernels():
    """The other tests of native code are skipped where there is none: code that does not compile must not look like that."""
    reason = library.why_not()
    assert reason is None or reason.startswith(("no C++ compiler found", "the processor lacks ")), reason


ROOT = pathlib.Path(__file__).parents[2]
# The library's file, before any test loads another one.
LOADED = set(re.findall(r"/\S*/native-[0-9a-f]{20}\.so", pathlib.Path("/proc/self/maps").read_text()))
# What other processors have, as flags that come after -march=native; and what must not be in their code.
PROCESSORS = {"avx2": ("-mavx2 -mfma -mno-avx512f", "zmm"), "avx512f": ("-mno-avx512bf16", "vdpbf16ps")}


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A fresh folder for the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxserve"


def why_not() -> str | None:
    """As in a new process, short of the registration: None if there is a library."""
    try:
        library._load()
    except library.NativeUnavailableError as error:
        return str(error)
    return None


def write_program(path: pathlib.Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fake_compiler(folder: pathlib.Path) -> str:
    """Compiles nothing, slowly, and links the library that is there already; keeps a record of that."""
    (loaded,) = LOADED
    made = shutil.copy(loaded, folder / "made.so")
    return write_program(
        folder / "fake-g++",
        f"""case "$*" in
  --version) echo fake ;;
  *" -c "*) touch "${{@: -1}}" ;;
  *) sleep 0.3; cp {made} "${{@: -1}}"; echo linked >> {folder}/record ;;
esac""",
    )


def run_python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"HOME": os.environ.get("HOME", "/"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++") or not {"avx2", "fma"} <= library._processor(),
    reason="needs g++ and a processor with AVX2",
)
def test_there_are_native_kernels_and_they_are_the_default_where_a_compiler_and_processor_are():
    assert library.why_not() is None
    assert resolve_backend(None) == EngineConfig().backend == "native"


def test_without_a_compiler_plain_jax_serves_and_asking_for_native_names_the_remedy(tmp_path):
    code = """
from jaxserve import EngineConfig, Engine
from pallas_kernels.backend import check_runs_here
print(EngineConfig().backend)
try:
    check_runs_here("native", interpret=False)
except ValueError as error:
    print(error)
"""
    out, err = run_python(code, PATH="", XDG_CACHE_HOME=str(tmp_path)).communicate(timeout=120)
    assert out.splitlines() == [
        "reference",
        "backend 'native' cannot run here: no C++ compiler found: install g++ or set CXX; or use 'reference'",
    ], err


def test_the_engine_refuses_native_where_it_cannot_be(monkeypatch):
    from jaxserve import Engine
    from tests import small_model

    monkeypatch.setattr(library, "why_not", lambda: "no compiler: install one")
    assert EngineConfig().backend == "reference"
    config = EngineConfig(**small_model.CAPACITIES, attention_backend="native")
    with pytest.raises(ValueError, match="'native' cannot run here: no compiler: install one; or use 'reference'"):
        Engine(small_model.make_params(), small_model.MODEL, config)


def test_a_compiler_that_does_not_work_is_passed_over(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    wrong = tmp_path / "not-a-program"
    wrong.write_bytes(b"\0")
    wrong.chmod(0o755)
    for name in ("/bin/false", "/no/such/g++", str(wrong)):
        monkeypatch.setenv("CXX", name)
        assert why_not() == "no C++ compiler found: install g++ or set CXX"


def test_a_compiler_that_fails_is_named_with_what_it_said_and_leaves_nothing_behind(cache, monkeypatch, tmp_path):
    path = write_program(tmp_path / "g++", '[ "$1" = --version ] || { echo "no such header: x.h"; exit 1; }')
    monkeypatch.setenv("CXX", path)
    assert why_not().startswith(f"{path} failed: no such header: x.h")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    assert why_not() == f"{cache} can be written to by others: make it yours alone"


def test_a_new_folder_is_for_its_owner_only(cache):
    assert library._cache_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_place_that_cannot_be_written_to_is_a_reason_and_no_crash(cache, monkeypatch, tmp_path):
    def full(**_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", full)
        assert why_not() == f"{cache} cannot be used: [Errno 28] No space left on device"
    cache.rmdir()
    cache.write_text("a file")
    assert why_not() == f"{cache} cannot be used: File exists"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home.")))
    assert "Set XDG_CACHE_HOME" in why_not()


@pytest.mark.parametrize("missing", ["avx2", "fma"])
def test_a_processor_that_lacks_something_is_told(monkeypatch, missing):
    monkeypatch.setattr(library, "_processor", lambda: frozenset({"avx2", "fma"} - {missing}))
    assert why_not() == f"the processor lacks {missing}"
    monkeypatch.undo()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert why_not() == "the processor lacks avx2 and fma"


@available
def test_a_torn_library_is_made_anew_and_a_whole_one_is_not(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path))
    record = tmp_path / "record"
    assert why_not() is None
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    assert why_not() is None and record.read_text().count("linked") == 1
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 1
    for count, torn in enumerate((b"", whole[:100], whole[:5000], whole[: len(whole) // 2], whole[:-1], bytes(broken))):
        path.unlink()  # the one that is loaded must not change
        path.write_bytes(torn)
        assert why_not() is None
        assert path.read_bytes() == whole
        assert record.read_text().count("linked") == count + 2


@available
def test_two_processes_may_build_at_once(tmp_path):
    environment = {"CXX": fake_compiler(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    code = "from tests.pallas_kernels import native_bits; from pallas_kernels.native import library; "
    code += "print(library.why_not(), native_bits.digest())"
    processes = [run_python(code, **environment) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    expected = f"None {native_bits.digest()}\n"
    assert [out for out, _ in results] == [expected, expected], results
    assert [path.suffix for path in (tmp_path / "jaxserve").iterdir()] == [".so"]  # no scraps


@available
@pytest.mark.parametrize("num_threads", [1, 9])
def test_no_bit_depends_on_the_number_of_threads(num_threads):
    environment = dict(os.environ) | {"NPROC": str(num_threads), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.pallas_kernels.native_bits"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [native_bits.digest(), str(num_threads)], done.stderr


@pytest.mark.slow
@available
@pytest.mark.parametrize("processor", PROCESSORS)
def test_code_for_other_processors_gives_right_results(processor):
    """The tests of results in a process whose compiler is told of a lesser processor."""
    if processor == "avx512f" and "avx512f" not in library._processor():
        pytest.skip("the processor has no AVX-512")
    flags, absent = PROCESSORS[processor]
    folder = library._cache_folder() / "test-compilers"  # always the same, so that what they build is kept
    folder.mkdir(exist_ok=True)
    compiler = write_program(folder / f"g++-{processor}", f'exec {library._compiler()[0]} "$@" {flags}')
    here = pathlib.Path(__file__).parent
    tests = [str(here / f"test_native_{name}.py") for name in ("product", "attention", "sampling")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", SOME]
    environment = dict(os.environ) | {"CXX": compiler}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 80 and "skipped" not in done.stdout
    code = "from pallas_kernels.native import library; print(library._load()._name)"
    path = run_python(code, **environment).communicate(timeout=60)[0].strip()
    assert path not in LOADED
    assembly = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "vfmadd" in assembly and absent not in assembly


# All that compute results, less what is slow to compile and the same for all processors.
SOME = (
    "native_product and not plain- or native_attention and not refused or first_uniform or only_possible or finite or "
)
SOME += "stable_sort or large_vocabulary or outside_the_support_is_ever"
