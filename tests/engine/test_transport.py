"""The outputs that the Engine unpacks from one array equal those of `run_steps`."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.core.programs import programs
from jaxserve.core.scheduler import init_state
from jaxserve.core.step import empty_outputs
from jaxserve.engine.programs import engine_programs
from jaxserve.engine.transport import Reader, pack
from tests import workload
from tests.workload import CONFIG, MODEL, make_params


def scrambled(tree, seed=0):
    """Returns a tree of the same shapes and dtypes with random bits, NaN and infinities included."""
    rng = np.random.default_rng(seed)

    def bits(leaf):
        if leaf.dtype == bool:
            return rng.integers(0, 2, leaf.shape).astype(bool)
        return rng.integers(-(2**31), 2**31, leaf.shape).astype(np.int32).view(leaf.dtype)

    return jax.tree.map(bits, tree)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def without_prompt(outputs):
    return outputs.replace(steps=outputs.steps.replace(prompt=None))


@pytest.mark.parametrize("num_steps", [1, 5])
def test_unpacked_is_what_was_packed(num_steps):
    config = dataclasses.replace(CONFIG, max_steps_per_call=num_steps)
    outputs = scrambled(jax.eval_shape(lambda: empty_outputs(num_steps, config)))
    packed = np.asarray(pack(without_prompt(outputs)))
    reader = Reader(config)
    assert_same_bits(reader.unpack(packed, None), without_prompt(outputs))
    assert_same_bits(reader.unpack(packed, outputs.steps.prompt), outputs)


def test_the_engine_reads_what_run_steps_returns():
    params = make_params()
    leaves, structure = jax.tree.flatten(params)
    ours, plain = engine_programs(MODEL, CONFIG, structure, leaves[0].sharding), programs(MODEL, CONFIG)
    requests, number = workload.crowd(0, 4), np.int32(9)
    state, outputs = plain["run_steps"](params, workload.start(requests, CONFIG), number)
    same_state, packed = ours.run_steps(tuple(leaves), workload.start(requests, CONFIG), number)
    assert int(outputs.num_steps) == 9 and np.asarray(outputs.steps.sampled).any()
    assert_same_bits(same_state, state)
    assert_same_bits(Reader(CONFIG).unpack(np.asarray(packed.packed), packed.prompt), jax.device_get(outputs))


def test_the_engine_starts_with_the_empty_state():
    leaves, structure = jax.tree.flatten(make_params())
    aux = np.arange(3.0, dtype=np.float32)
    init = engine_programs(MODEL, CONFIG, structure, leaves[0].sharding).init
    assert_same_bits(init(aux=aux), init_state(MODEL, CONFIG, aux=aux))
