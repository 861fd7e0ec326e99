"""Logits equal those of transformers in float32, for every family and feature, through dense attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxserve.models import ModelConfig, causal_attend, graphdef_of
from jaxserve.models.checkpoint.hugging_face import load_hugging_face
from jaxserve.models.families.hugging_face import read_model_config
from tests.models import zoo

TOLERANCE = 1e-4
BATCH, TIME = 2, 40


def _tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (BATCH, TIME))


def _reference_logits(reference) -> np.ndarray:
    with torch.no_grad():
        logits = reference.model(torch.from_numpy(_tokens(reference.model.config.vocab_size))).logits
    return logits.reshape(BATCH * TIME, -1).numpy()


@functools.cache
def _forward(config: ModelConfig):
    @jax.jit
    def forward(params, tokens, positions):
        model = nnx.merge(graphdef_of(config), params)
        hidden, _ = model(tokens, positions, attend=causal_attend(BATCH, TIME), kv=None)
        return model.logits(hidden)

    return forward


def _logits(config: ModelConfig, params: nnx.State) -> np.ndarray:
    tokens = jnp.asarray(_tokens(config.vocab_size).reshape(-1), jnp.int32)
    return np.asarray(_forward(config)(params, tokens, jnp.tile(jnp.arange(TIME), BATCH)))


def _worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest over the rows of max |a - b| / max |b|."""
    return float((np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)).max())


def test_logits_equal_those_of_transformers(reference):
    config = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    assert _worst_error(_logits(config, params), _reference_logits(reference)) <= TOLERANCE


def _with_rope(**changes):
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


def _with(**changes):
    return lambda config: dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", _with_rope(theta=10500.0)),
        ("llama-mlp-bias-group2-eps", _with(norm_eps=0.04)),
        ("llama-tied-group2-llama3", _with_rope(high_freq_factor=3.9)),
        ("llama-biases-group4-dim20-linear", _with_rope(factor=3.1)),
        ("llama-biases-tied-group7-dim6-yarn", _with_rope(attention_factor=1.13)),
        ("mistral-window-group1-yarn-mscale", _with_rope(truncate=True)),
        ("mistral-window-group1-yarn-mscale", _with_rope(mscale_all_dim=0.6)),
        ("mistral-window-group4-dim20", _with(windows=(7, 8))),
        ("qwen2-mixed-group2-yarn", _with(windows=(None, 5))),
        ("qwen3-mixed-group7-theta", _with(windows=(6, None))),
        ("qwen3-group1-dim20-linear", _with(norm_eps=0.009)),
    ],
)
def test_the_tolerance_tells_a_slightly_wrong_setting(name, change, zoo_references):
    reference = zoo_references(next(case for case in zoo.CASES if case.name == name))
    config = change(read_model_config(reference.directory))
    params = load_hugging_face(reference.directory, config, dtype=jnp.float32)
    assert _worst_error(_logits(config, params), _reference_logits(reference)) > TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["llama-biases-group4-dim20-linear", "mistral-window-group4-dim20", "qwen3-mixed-biases-group2-yarn"],
)
def test_no_parameter_can_be_permuted_without_notice(name, zoo_references):
    """Exchanging two neighbours along any axis of any leaf moves the logits beyond the tolerance."""
    reference = zoo_references(next(case for case in zoo.CASES if case.name == name))
    config = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    expected = _logits(config, params)
    leaves, structure = jax.tree.flatten(params)
    first = int(_tokens(config.vocab_size)[0, 0])
    for index, leaf in enumerate(leaves):
        for axis, size in enumerate(leaf.shape):
            order = np.arange(size)
            chosen = [first % size, (first + 1) % size]
            order[chosen] = order[chosen[::-1]]
            permuted = leaf[(slice(None),) * axis + (order,)]
            changed = jax.tree.unflatten(structure, [*leaves[:index], permuted, *leaves[index + 1 :]])
            assert _worst_error(_logits(config, changed), expected) > TOLERANCE, f"leaf {index}, axis {axis}"
