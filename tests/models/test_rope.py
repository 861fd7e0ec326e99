"""Frequencies and attention factors equal those of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxserve.models import RopeConfig, rotated_heads
from jaxserve.models.families.rope_blocks import read_rope, write_rope
from jaxserve.models.rope import frequencies, rotations

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SETTINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3-other-bands": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 32.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn-betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2.0},
    "yarn-untruncated": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn-attention-factor": {"rope_type": "yarn", **YARN, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", **YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-mscale-alone": {"rope_type": "yarn", **YARN, "mscale": 0.5},
    "yarn-short": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("theta", [10000.0, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [6, 20, 64, 128])
@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_equal_those_of_transformers(name, head_dim, theta):
    settings = {"rope_theta": theta, **SETTINGS[name]}
    max_position = 131072
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rope_parameters=dict(settings),
    )
    init = ROPE_INIT_FUNCTIONS.get(settings["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_factor = init(config)
    rope = read_rope({"rope_parameters": settings}, max_position)
    actual, factor = frequencies(rope, head_dim)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert actual.dtype == np.float32


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_writing_and_reading(name):
    rope = read_rope({"rope_parameters": SETTINGS[name] | {"rope_theta": 1e6}}, 4096)
    written = write_rope(rope)
    assert read_rope(written, 4096) == rope
    assert read_rope({"rope_parameters": written["rope_parameters"]}, 4096) == rope
    assert read_rope({key: written[key] for key in ("rope_theta", "rope_scaling")}, 4096) == rope


def test_rotations_at_far_positions_equal_those_of_transformers():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    positions = np.asarray([0, 1, 77, 4095, 100_000])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    ours = rotations(RopeConfig(), 64, jnp.asarray(positions, jnp.int32))
    # Powers in float32 differ by a unit or two in the last place from library to library: an angle by 2^-22 of itself.
    allowed = 2e-6 + np.outer(positions, frequencies(RopeConfig(), 64)[0]) * 2.0**-22
    for actual, expected in zip(ours, (cos, sin), strict=True):
        assert np.all(np.abs(actual - expected[0, :, :32].numpy()) <= allowed)


def test_rotated_queries_and_keys_depend_on_their_distance_only():
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(np.tile(rng.standard_normal((1, 1, 3, 16)), (3, 1, 1, 1)), jnp.float32)
    q, _, _ = rotated_heads(qkv, *rotations(RopeConfig(), 16, jnp.asarray([5, 50, 500], jnp.int32)))
    _, k, _ = rotated_heads(qkv, *rotations(RopeConfig(), 16, jnp.asarray([2, 47, 497], jnp.int32)))
    products = jnp.sum(q * k, axis=(1, 2))
    np.testing.assert_allclose(products, np.full(3, products[0]), rtol=1e-4)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'dynamic' is not supported"):
        frequencies(RopeConfig(kind="dynamic"), 16)
