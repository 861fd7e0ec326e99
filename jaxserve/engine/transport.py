"""The compiled programs as the Engine calls them: few arrays go in and out.

An array costs the host some microseconds to pass and some ten to read, however small it is, and a module's state, walked in
Python, as much again. So parameters are passed as the tuple of their leaves, and outputs come back as the bits of one array.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.forward import PromptLogprobs
from jaxserve.core.logits_fn import LogitsFn
from jaxserve.core.programs import compiler_options, programs
from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler.state import EngineState, init_state
from jaxserve.core.step import StepOutputs, empty_outputs, run_steps
from jaxserve.models import ModelConfig


@record
class PackedOutputs(Record):
    """What a call of `run_steps` did, to be read by `Reader`."""

    packed: Int32[Array, " N"]  # all but what is known of prompt tokens
    prompt: PromptLogprobs  # of each step


@functools.cache
def engine_programs(
    model: ModelConfig, config: EngineConfig, logits_fn: LogitsFn | None, structure: Any
) -> dict[str, Callable[..., Any]]:
    """`run_steps` of leaves, a state and a number, which returns a state and `PackedOutputs`; `update`; `init`.

    `init` is `init_state` as one program: operation by operation it takes longer, and tens of MB that JAX keeps.

    Args:
      structure: `jax.tree.structure` of the parameters.
    """

    def run_leaves(
        leaves: tuple[Array, ...], state: EngineState, num_steps: Int32[Array, ""]
    ) -> tuple[EngineState, PackedOutputs]:
        params = jax.tree.unflatten(structure, leaves)
        state, outputs = run_steps(params, state, num_steps, model=model, config=config, logits_fn=logits_fn)
        rest = outputs.replace(steps=outputs.steps.replace(prompt=None))
        return state, PackedOutputs(packed=pack(rest), prompt=outputs.steps.prompt)

    compiled = jax.jit(run_leaves, donate_argnums=1, compiler_options=compiler_options(config))
    init = jax.jit(functools.partial(init_state, model, config))
    return {"init": init, "update": programs(model, config, logits_fn)["update"], "run_steps": compiled}


def pack(tree: Any) -> Int32[Array, " N"]:
    """The bits of a tree of int32, float32 and bool arrays, one array after the other."""

    def bits(leaf: Array) -> Int32[Array, " _"]:
        assert leaf.dtype in (jnp.int32, jnp.float32, bool), leaf.dtype
        whole = leaf.astype(jnp.int32) if leaf.dtype == bool else lax.bitcast_convert_type(leaf, jnp.int32)
        return whole.reshape(-1)

    return jnp.concatenate([bits(leaf) for leaf in jax.tree.leaves(tree)])


class Reader:
    """Reads `PackedOutputs`, once they are on the host."""

    def __init__(self, config: EngineConfig) -> None:
        like = jax.eval_shape(lambda: empty_outputs(config.max_steps_per_call, config))
        leaves, self._structure = jax.tree.flatten(like.replace(steps=like.steps.replace(prompt=None)))
        ends = [0, *np.cumsum([math.prod(leaf.shape) for leaf in leaves]).tolist()]
        self._places = [
            (slice(*part), np.dtype(leaf.dtype).kind, leaf.shape)
            for part, leaf in zip(itertools.pairwise(ends), leaves, strict=True)
        ]

    def unpack(self, packed: np.ndarray, prompt: PromptLogprobs | None) -> StepOutputs:
        """The outputs as arrays of the host, which mostly share the memory of `packed`."""
        floats = packed.view(np.float32)
        leaves = [
            (packed[place] != 0 if kind == "b" else (floats if kind == "f" else packed)[place]).reshape(shape)
            for place, kind, shape in self._places
        ]
        outputs = jax.tree.unflatten(self._structure, leaves)
        return outputs if prompt is None else outputs.replace(steps=outputs.steps.replace(prompt=prompt))
