"""The flags of the kernel benchmark, and the record that is made of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from kernel_bench.cases import DTYPES, OPS
from kernel_bench.contenders import BASELINES, SPLITTING
from lib.flag_values import integers, names, options_from_flags

from pallas_kernels.backend import BACKENDS, check_runs_here, resolve_backend
from pallas_kernels.paged_attention.shapes import SHAPES

_KERNEL_FLAGS = ("shapes", "batch", "baselines", "num_splits", "tune")
_STEP_FLAGS = ("model", "slots", "engine_config", "steps")
_CACHE_MB = {"cpu": 32, "gpu": 64}  # no less than the largest cache of the usual ones
_STEP_DTYPES = ("float32", "bfloat16", "float16")


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the benchmark."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_enum("op", "all", [*OPS, "all", "step"], "What to measure; all: the three kernels.", **to)
    flags.DEFINE_list("shapes", "llama3-8b", f"Of attention: {', '.join(SHAPES)}; or all.", **to)
    flags.DEFINE_list(
        "backend", "all", f"{', '.join(BACKENDS)}; all: those that run here. step: the default one.", **to
    )
    flags.DEFINE_list("baselines", list(BASELINES), "The baselines to measure; none: no baseline.", **to)
    flags.DEFINE_list("dtype", "bfloat16", f"Of the pages: {', '.join(DTYPES)}. step: of the weights.", **to)
    flags.DEFINE_list("batch", "1,8,64,256", "Rows: sequences that decode or write, or rows of one chunk.", **to)
    flags.DEFINE_list(
        "context", "1024,4096,16384", "Tokens per sequence; rotary_write takes the least, it costs alike.", **to
    )
    flags.DEFINE_integer("page_size", None, "Tokens per page, in place of the shape's.", lower_bound=1, **to)
    flags.DEFINE_integer("num_splits", None, "Splits of decode, in place of the kernel's choice.", lower_bound=1, **to)
    flags.DEFINE_boolean("tune", False, "decode: try splits and page sizes, print the best.", **to)
    flags.DEFINE_integer("repeats", 20, "Samples per contender.", lower_bound=1, **to)
    flags.DEFINE_integer("seed", 0, "Of the data.", lower_bound=0, upper_bound=2**31 - 1, **to)
    flags.DEFINE_integer("cache_mb", None, "Largest cache, MiB; by default 64, on CPU 32.", lower_bound=0, **to)
    flags.DEFINE_string("csv", None, "Write the measurements to this file too.", **to)
    flags.DEFINE_string("json", None, "Write them as JSON lines, with all parameters.", **to)
    flags.DEFINE_string("model", "configs/models/llama3-8b.json", "step: a config.json file.", **to)
    flags.DEFINE_list("slots", "1,8,64,256", "step: sequences that decode.", **to)
    flags.DEFINE_string("engine_config", None, "step: a JSON file; its slots, pages and lengths do not count.", **to)
    flags.DEFINE_integer("steps", 16, "step: steps per timed call.", lower_bound=2, **to)


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked values of the flags."""

    op: str
    shapes: tuple[str, ...]
    backends: tuple[str, ...]
    baselines: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    page_size: int | None
    num_splits: int | None
    tune: bool
    repeats: int
    seed: int
    cache_bytes: int
    csv: str | None
    json: str | None
    model: str
    slots: tuple[int, ...]
    engine_config: str | None
    steps: int


def parse_options(values: flags.FlagValues) -> Options:
    """Returns the options that the flags set.

    Raises:
      ValueError: if a flag's value is not valid, has no effect on what is measured, or asks for a backend that cannot run.
    """
    step = values.op == "step"
    for name in _KERNEL_FLAGS if step else _STEP_FLAGS:
        if values[name].present:
            raise ValueError(f"--{name} has no effect on --op={values.op}: leave it out")
    if values.tune and values.op != "decode":
        raise ValueError(f"--tune is for --op=decode, not --op={values.op}")
    if values.tune and values["baselines"].present:
        raise ValueError("--baselines has no effect on --tune, which compares a backend with itself: leave it out")
    backends = _backends(values.backend)
    if values.num_splits is not None and (values.op not in ("decode", "all") or not set(backends) & set(SPLITTING)):
        raise ValueError(f"--num_splits={values.num_splits} has an effect on decode with {' or '.join(SPLITTING)} only")
    dtypes = names("dtype", values.dtype, _STEP_DTYPES if step else DTYPES, all_allowed=False)
    if step:
        backends = (resolve_backend(None),) if values.backend == ["all"] else backends
        if len(backends) > 1:
            raise ValueError(f"--op=step takes one --backend, not {', '.join(backends)}")
    cache_mb = values.cache_mb
    if cache_mb is None:
        cache_mb = _CACHE_MB.get(jax.default_backend(), 64)
    no_baselines = values.baselines == ["none"]
    return options_from_flags(
        Options,
        values,
        shapes=names("shapes", values.shapes, tuple(SHAPES)),
        backends=backends,
        baselines=() if no_baselines else names("baselines", values.baselines, BASELINES, all_allowed=False),
        dtypes=dtypes,
        batches=integers("batch", values.batch),
        contexts=integers("context", values.context),
        cache_bytes=cache_mb * 2**20,
        slots=integers("slots", values.slots),
    )


def _backends(given: Sequence[str]) -> tuple[str, ...]:
    runnable = []
    for name in names("backend", given, BACKENDS):
        try:
            check_runs_here(name, interpret=False)
            runnable.append(name)
        except ValueError as error:
            if given != ["all"]:
                rule = str(error).partition(":")[0]
                raise ValueError(f"{rule}: use reference (interpreted kernels are not worth timing)") from None
    return tuple(runnable)
