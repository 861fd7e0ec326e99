"""A tiny model with random parameters, its checkpoint on disk, and how two sets of parameters are compared."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxserve.models import ModelConfig
from jaxserve.models.checkpoint.hugging_face import CheckpointError, load_hugging_face
from jaxserve.models.params import abstract_params, leaves_with_paths

CONFIG = ModelConfig("qwen3", 50, 16, 24, 2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, windows=(None, 4))
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def randomised(config: ModelConfig, dtype=jnp.float32) -> nnx.State:
    """Parameters of which every leaf is random, norms and biases too."""
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32).astype(dtype)

    return jax.tree.map(random, abstract_params(config, dtype))


def assert_equal(actual: nnx.State, expected: nnx.State) -> None:
    """Same structure, dtypes and values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves_with_paths(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def rewrite(directory: pathlib.Path, change) -> None:
    """Applies `change` to the dict of tensors of the single file."""
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def assert_refused(directory: pathlib.Path, *words: str, dtype=jnp.float32) -> None:
    """Loading fails with one line that holds all the words."""
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(directory, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
