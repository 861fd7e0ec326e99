"""The outputs of a call: packed into one array on the device, unpacked on the host, and handed out to samples.

Reading an array costs the host some ten microseconds, however small it is. So the outputs of a call, about twenty arrays, come
back as the bits of one. Log probabilities of prompt tokens are large; they stay on the device unless a request asks for them.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.forward import PromptLogprobs
from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler import Status
from jaxserve.core.step import StepOutputs, empty_outputs
from jaxserve.engine.live_requests import LiveSample

# Called as observer(outputs, samples_by_row, num_waiting) with views of one buffer on the host: copy what you keep. The samples
# are those in queue rows, the ones that end in this call included; num_waiting is how many samples more wait on the host.
Observer = Callable[[StepOutputs, Mapping[int, LiveSample], int], None]


@record
class PackedOutputs(Record):
    """The outputs of a call of `run_steps`, which a `Reader` unpacks."""

    packed: Int32[Array, " N"]  # all outputs except log probabilities of prompt tokens
    prompt: PromptLogprobs  # log probabilities of prompt tokens, per step


def pack(tree: Any) -> Int32[Array, " N"]:
    """Returns the bits of a tree of int32, float32 and bool arrays, one array after the other."""

    def bits(leaf: Array) -> Int32[Array, " _"]:
        assert leaf.dtype in (jnp.int32, jnp.float32, bool), leaf.dtype
        whole = leaf.astype(jnp.int32) if leaf.dtype == bool else lax.bitcast_convert_type(leaf, jnp.int32)
        return whole.reshape(-1)

    return jnp.concatenate([bits(leaf) for leaf in jax.tree.leaves(tree)])


class Reader:
    """Unpacks `PackedOutputs` on the host."""

    def __init__(self, config: EngineConfig) -> None:
        like = jax.eval_shape(lambda: empty_outputs(config.max_steps_per_call, config))
        leaves, self._structure = jax.tree.flatten(like.replace(steps=like.steps.replace(prompt=None)))
        ends = [0, *np.cumsum([math.prod(leaf.shape) for leaf in leaves]).tolist()]
        self._places = [
            (slice(*part), np.dtype(leaf.dtype).kind, leaf.shape)
            for part, leaf in zip(itertools.pairwise(ends), leaves, strict=True)
        ]

    def unpack(self, packed: np.ndarray, prompt: PromptLogprobs | None) -> StepOutputs:
        """Returns the outputs as host arrays; all except the boolean ones share the memory of `packed`."""
        floats = packed.view(np.float32)
        leaves = [
            (packed[place] != 0 if kind == "b" else (floats if kind == "f" else packed)[place]).reshape(shape)
            for place, kind, shape in self._places
        ]
        outputs = jax.tree.unflatten(self._structure, leaves)
        return outputs if prompt is None else outputs.replace(steps=outputs.steps.replace(prompt=prompt))


def take_prompt_logprobs(outputs: StepOutputs, samples_by_row: Mapping[int, LiveSample]) -> None:
    """Hands the log probabilities of prompt tokens to the requests that asked for them."""
    prompt: Any = outputs.steps.prompt
    if prompt is None:
        return
    for index, place in np.argwhere(prompt.row_id[: int(outputs.num_steps)] < len(outputs.status)).tolist():
        samples_by_row[int(prompt.row_id[index, place])].live.add_prompt_logprob(
            int(prompt.position[index, place]),
            float(prompt.logprob[index, place]),
            int(prompt.rank[index, place]),
            prompt.top_ids[index, place],
            prompt.top_logprobs[index, place],
        )


def take_tokens(outputs: StepOutputs, samples_by_row: Mapping[int, LiveSample]) -> dict[int, LiveSample]:
    """Appends every drawn token to its sample; returns the samples that got any, by row, in the order of their first token."""
    steps, extended = outputs.steps, {}
    drawn: Any = steps.drawn
    where = np.nonzero(steps.sampled[: int(outputs.num_steps)])
    fields: Any = (steps.row_id, drawn.token, drawn.logprob, drawn.rank, steps.status)
    columns = (field[where].tolist() for field in fields)
    for index, slot, row, token, logprob, rank, status in zip(*where, *columns, strict=True):
        sample = samples_by_row[row]
        if sample.finished:
            continue
        extended[row] = sample
        top = drawn.top_ids[index, slot], drawn.top_logprobs[index, slot]
        sample.append(token, logprob, rank, *top, Status(status))
    return extended
