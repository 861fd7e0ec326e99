"""Strict JAX for all tests: no implicit promotion of dtypes or ranks, two devices, compiled programs kept on disk."""

import gc
import importlib.util
import os
import pathlib
from collections.abc import Iterator

# Read when the backend starts, which no import may do.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # processes side by side keep to folders of their own
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "jaxserve-tests" / f"jax-{jax.__version__}" / _WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

_MANY_MAPS = 20_000

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# What CI runs under the second JAX version too: what depends on how JAX traces, lowers and computes. The arithmetic of native
# kernels does not, apart from the calls, which the tests of blocks, models and sampling make. Parity needs torch, which that
# run lacks.
CORE = (
    "core/cache",
    "core/scheduler",
    "core/test_columns.py",
    "core/test_forward.py",
    "core/test_logit_rules.py",
    "core/test_optional.py",
    "core/test_sampling.py",
    "core/test_step.py",
    "pallas_kernels",
    "test_config.py",
    "test_import.py",
)
NOT_CORE = tuple(f"pallas_kernels/test_native_{name}.py" for name in ("int8", "int8_model", "library", "product"))
collect_ignore = [] if importlib.util.find_spec("torch") else ["models"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require_gate", action="store_true", help="fail, not skip, tests whose compilers are missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of `CORE`, less those of `NOT_CORE`."""
    here = pathlib.Path(__file__).parent
    for name in (*CORE, *NOT_CORE):
        assert (here / name).exists(), f"tests/{name} is not there: name what CI runs under the second JAX version"
    for item in items:
        path = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        if path.startswith(CORE) and path not in NOT_CORE:
            item.add_marker("core")


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Lets compiled programs go before the process runs out of memory maps: each takes dozens, Linux gives 65,530 in all,
    and XLA crashes on the first that it is refused. Not after every module: some share programs."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()
