"""Random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import ModelConfig
from jaxserve.models.params import abstract_params, leaves_with_paths, random_params
from tests.models.tiny import CONFIG, assert_equal


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_random_parameters_look_like_a_fresh_model(dtype):
    params = random_params(CONFIG, 3, dtype)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(CONFIG, dtype))
    for path, leaf in leaves_with_paths(params):
        assert leaf.dtype == dtype
        expected = {"scale": (1.0, 0.0)}.get(path[-1], (0.0, 0.02))
        values = np.asarray(leaf.astype(jnp.float32))
        np.testing.assert_allclose((values.mean(), values.std()), expected, atol=0.004)


def test_random_parameters_follow_from_the_seed_and_repeat_no_row():
    first, again, other = (random_params(CONFIG, seed, jnp.bfloat16) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert (first.embedding[...] != other.embedding[...]).any()
    embedding = np.asarray(random_params(ModelConfig("llama", 9000, 128, 8, 1, 2, 1, 4), 1, jnp.float32).embedding[...])
    assert embedding.size > 1_000_003
    assert len(np.unique(embedding, axis=0)) == len(embedding)
    assert (first.blocks[0].ffw.down[...] != first.blocks[1].ffw.down[...]).any()
