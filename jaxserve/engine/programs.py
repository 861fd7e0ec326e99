"""The compiled programs as an engine calls them, with few arrays as arguments and results.

Each array that the host passes costs it some microseconds, and walking a module's state in Python costs as much again. So
parameters are passed as the tuple of their leaves, and outputs come back packed (`jaxserve.engine.transport`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.programs import compiler_options, update
from jaxserve.core.scheduler.state import EngineState, init_state
from jaxserve.core.step import run_steps
from jaxserve.engine.transport import PackedOutputs, pack
from jaxserve.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one engine; `update` and `run_steps` donate the state.

    Attributes:
      init: `init(aux=...)` returns the empty state. It is one program, because single operations take longer and leave tens
        of MB of memory with JAX.
      update: `update(state, changes)` is `jaxserve.core.programs.update`: one program per width of the submission, and one for
        changes without a submission.
      run_steps: `run_steps(leaves, state, num_steps)` takes the leaves of the parameters and returns a state and
        `PackedOutputs`.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    run_steps: Callable[..., Any]


def engine_programs(
    model: ModelConfig,
    config: EngineConfig,
    structure: Any,
    sharding: jax.sharding.Sharding,
    logits_fn: LogitsFn | None = None,
) -> Programs:
    """Returns the programs of an engine.

    Engines with equal arguments share them, except `run_steps` with a `logits_fn`: that program lives as long as its engine.

    Args:
      model: static.
      config: static, with all capacities chosen.
      structure: `jax.tree.structure` of the parameters.
      sharding: the sharding of the state.
      logits_fn: changes the logits that tokens are drawn from.
    """
    shared = _shared_programs(model, config, structure, sharding)
    if logits_fn is None:
        return shared
    run_leaves = _compiled_run_steps(model, config, structure, _platform(sharding), logits_fn)
    return dataclasses.replace(shared, run_steps=run_leaves)


@functools.cache
def _shared_programs(
    model: ModelConfig, config: EngineConfig, structure: Any, sharding: jax.sharding.Sharding
) -> Programs:
    platform = _platform(sharding)
    init = functools.partial(init_state, model, config, platform=platform)
    return Programs(
        init=jax.jit(init, out_shardings=sharding),
        update=jax.jit(
            functools.partial(update, model=model, config=config),
            donate_argnums=0,
            compiler_options=compiler_options(config, platform),
        ),
        run_steps=_compiled_run_steps(model, config, structure, platform, None),
    )


def _compiled_run_steps(
    model: ModelConfig, config: EngineConfig, structure: Any, platform: str, logits_fn: LogitsFn | None
) -> Callable[..., Any]:
    def run_leaves(
        leaves: tuple[Array, ...], state: EngineState, num_steps: Int32[Array, ""]
    ) -> tuple[EngineState, PackedOutputs]:
        params = jax.tree.unflatten(structure, leaves)
        state, outputs = run_steps(params, state, num_steps, model=model, config=config, logits_fn=logits_fn)
        rest = outputs.replace(steps=outputs.steps.replace(prompt=None))
        return state, PackedOutputs(packed=pack(rest), prompt=outputs.steps.prompt)

    return jax.jit(run_leaves, donate_argnums=1, compiler_options=compiler_options(config, platform))


def _platform(sharding: jax.sharding.Sharding) -> str:
    return next(iter(sharding.device_set)).platform
