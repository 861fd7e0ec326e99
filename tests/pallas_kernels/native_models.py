"""Small models of every family for the tests of native kernels: parameters, and logits over pages and in dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import ModelConfig
from jaxserve.core.cache.attention import BatchLayout, paged_attend
from jaxserve.models import causal_attend
from jaxserve.models.bind import bind
from jaxserve.models.native import PackedParams
from jaxserve.models.params import abstract_params, leaves_with_paths
from jaxserve.models.prepare import PLACES, Params

# Every family with each of its parts: biases, windows, norms of heads, tied and untied; sizes that fill no vector.
MODELS = {
    "llama": ModelConfig("llama", 131, 48, 80, 2, num_heads=4, num_kv_heads=4, head_dim=12),
    "llama, biases, tied": ModelConfig(
        *("llama", 50, 31, 37, 2, 7, 1, 6), qkv_bias=True, out_bias=True, ffw_bias=True, tied_embeddings=True
    ),
    "mistral, window": ModelConfig("mistral", 131, 48, 80, 2, 8, 2, 20, windows=(7, 7)),
    "qwen2, biases, tied": ModelConfig("qwen2", 131, 48, 80, 2, 4, 2, 12, qkv_bias=True, tied_embeddings=True),
    "qwen3, norms, window": ModelConfig("qwen3", 131, 48, 80, 2, 4, 1, 16, qk_norm=True, windows=(None, 6)),
}


@functools.cache
def make_params(name: str, dtype: str) -> nnx.State:
    """Random in every leaf, of sizes that make attention far from uniform."""
    rng = np.random.default_rng(0)

    def random(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        kind = path[-1]
        if leaf.ndim > 1 and "bias" not in kind:
            noise *= 0.3 if kind == "embedding" else 1.5 * leaf.shape[-1 if kind == "lm_head" else 0] ** -0.5
        else:
            noise = 0.3 * noise + (kind == "scale")
        return jnp.asarray(noise, jnp.float32).astype(dtype)

    shapes = abstract_params(MODELS[name], dtype)
    return jax.tree.unflatten(jax.tree.structure(shapes), [random(*leaf) for leaf in leaves_with_paths(shapes)])


def assert_equal(actual: Params, expected: Params) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def packed_leaf(params: Params, path: tuple) -> jax.Array:
    """What became of the parameter that had this path in the model."""
    assert isinstance(params, PackedParams)
    if path[0] == "blocks":
        (name,) = (name for name, place in PLACES.items() if place == path[2:])
        return getattr(params.blocks[path[1]], name)
    return getattr(params, path[0])


@functools.partial(jax.jit, static_argnames=("model", "backend"))
def paged_logits(params, kv, tokens, slot, position, batch_size, *, model: ModelConfig, backend: str):
    """Logits of rows of two slots, as `step` computes them, and the pages with these rows in them."""
    page_ids = jnp.asarray(np.random.default_rng(3).permutation(10).reshape(2, 5), jnp.int32)
    attend = paged_attend(
        page_ids,
        slot,
        position,
        BatchLayout.SINGLE,
        group_size=model.group_size,
        backend=backend,
        batch_size=batch_size,
    )
    transformer = bind(params, model)
    hidden, kv = transformer(tokens, position, attend=attend, kv=kv)
    return transformer.logits(hidden, batch_size), kv


@functools.partial(jax.jit, static_argnames="model")
def dense_logits(params, tokens, *, model: ModelConfig):
    transformer = bind(params, model)
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    hidden, _ = transformer(tokens, positions, attend=causal_attend(1, tokens.shape[0]), kv=None)
    return transformer.logits(hidden)


LENGTHS, NUM_NEW, NUM_ROWS = (13, 9), 20, 24


def generate(params: Params, model: ModelConfig, kv_dtype: str) -> tuple[list[list[int]], list[list[np.ndarray]]]:
    """Greedy tokens of two sequences, prompts in one batch and then a row each, and the logits of all rows."""
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, model.vocab_size, length).tolist() for length in LENGTHS]
    pages = jnp.zeros((10, model.num_kv_heads, 8, model.head_dim), kv_dtype)
    kv = tuple((pages, pages) for _ in range(model.num_layers))
    logits, done = [[], []], [0, 0]
    for _ in range(NUM_NEW):
        rows = [(slot, place) for slot in range(2) for place in range(done[slot], len(sequences[slot]))]
        slot, position = np.array(rows + [(2, 0)] * (NUM_ROWS - len(rows)), np.int32).T
        tokens = np.zeros(NUM_ROWS, np.int32)
        tokens[: len(rows)] = [sequences[slot][place] for slot, place in rows]
        out, kv = paged_logits(params, kv, tokens, slot, position, np.int32(len(rows)), model=model, backend="native")
        for row, (index, _) in enumerate(rows):
            logits[index].append(np.asarray(out[row]))
        done = [len(sequence) for sequence in sequences]
        for index in range(2):
            sequences[index].append(int(np.argmax(logits[index][-1])))
    return sequences, logits
