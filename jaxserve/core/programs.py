"""The step, and the changes that a host makes between steps, as jitted functions that donate the state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler.state import EngineState
from jaxserve.core.scheduler.submission import Handles, Submission, abort, collect, submit
from jaxserve.core.step import run_steps, step
from jaxserve.models import ModelConfig
from pallas_kernels.backend import compiles_for_cuda


@record
class Changes(Record):
    """The changes that a host makes to the state between two calls."""

    submission: Submission | None  # None: nothing is submitted
    collected: Bool[Array, " Q"]
    aborted: Bool[Array, " Q"]
    generation: Int32[Array, " Q"]  # generations of the rows to collect and abort


def update(
    state: EngineState, changes: Changes, *, model: ModelConfig, config: EngineConfig
) -> tuple[EngineState, Handles | None]:
    """Collects, aborts and submits in one call. Returns the state, and the handles; None without a submission."""
    state = collect(state, changes.collected, changes.generation)
    state = abort(state, changes.aborted, changes.generation)
    if changes.submission is None:
        return state, None
    return submit(state, changes.submission, model=model, config=config)


# Puts loops into CUDA graphs: without WHILE the host drives every loop of a step and reads each condition back. The list
# replaces XLA's own list, so it repeats the entries there. XLA leaves loops out where the driver is older than CUDA 12.3.
GPU_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
}


def compiler_options(config: EngineConfig, platform: str | None = None) -> dict[str, Any] | None:
    """Returns the compiler options for the programs of a configuration; None: XLA's defaults.

    Args:
      config: decides the backend.
      platform: platform of the devices that the programs are for; None: that of JAX's default device.
    """
    return GPU_COMPILER_OPTIONS if compiles_for_cuda(config.backend, platform) else None


def programs(
    model: ModelConfig, config: EngineConfig, logits_fn: LogitsFn | None = None
) -> dict[str, Callable[..., Any]]:
    """Returns the jitted functions of an engine by name: `step`, `run_steps` and `update`. Each donates the state.

    Without a `logits_fn` calls with equal arguments return the same functions, which live as long as the process. With one
    every call returns new functions, which live as long as the caller keeps them.

    On NVIDIA GPUs each is compiled with `GPU_COMPILER_OPTIONS`; a caller's own `jax.jit` of `run` should have them too.
    """
    return _shared_programs(model, config) if logits_fn is None else _make_programs(model, config, logits_fn)


@functools.cache
def _shared_programs(model: ModelConfig, config: EngineConfig) -> dict[str, Callable[..., Any]]:
    return _make_programs(model, config, None)


def _make_programs(
    model: ModelConfig, config: EngineConfig, logits_fn: LogitsFn | None
) -> dict[str, Callable[..., Any]]:
    options = compiler_options(config)
    static: dict[str, Any] = {"model": model, "config": config}
    stepping = static | {"logits_fn": logits_fn}
    return {
        "step": jax.jit(functools.partial(step, **stepping), donate_argnums=1, compiler_options=options),
        "run_steps": jax.jit(functools.partial(run_steps, **stepping), donate_argnums=1, compiler_options=options),
        "update": jax.jit(functools.partial(update, **static), donate_argnums=0, compiler_options=options),
    }
