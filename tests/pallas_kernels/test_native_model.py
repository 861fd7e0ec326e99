"""Models on native kernels: parameters prepared for them, and logits that are those of plain JAX with dense attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import Engine, EngineConfig, SamplingParams, prepare, run
from jaxserve.models.params import leaves_with_paths
from jaxserve.models.prepare import prepare_and_free, unprepared
from pallas_kernels import native
from pallas_kernels.native import library
from tests import small_model, workload
from tests.pallas_kernels.native_models import (
    LENGTHS,
    MODELS,
    NUM_NEW,
    assert_equal,
    dense_logits,
    generate,
    make_params,
    packed_leaf,
)

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

models = pytest.mark.parametrize("name", MODELS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@dtypes
@models
def test_preparing_packs_weights_widens_the_rest_and_loses_nothing(name, dtype):
    raw, model = make_params(name, dtype), MODELS[name]
    prepared = prepare(raw, model, "native")
    assert len(jax.tree.leaves(prepared)) == len(jax.tree.leaves(raw))
    num_packed = 0
    for path, old in leaves_with_paths(raw):
        kind, new = path[-1], packed_leaf(prepared, path)
        if kind in ("qkv", "out", "down"):
            expected = native.pack(old)
        elif kind == "gate_up":
            expected = native.pack_gated(old)
        elif kind == "lm_head" or (kind == "embedding" and model.tied_embeddings):
            expected = native.pack(old.T)
        else:
            expected = old if kind == "embedding" else old.astype(jnp.float32)
        assert (new.dtype, new.shape) == (expected.dtype, expected.shape), path
        np.testing.assert_array_equal(np.asarray(new), np.asarray(expected))
        num_packed += new.ndim == 4
    assert num_packed == 4 * model.num_layers + 1


@dtypes
@models
def test_preparing_again_changes_nothing_and_shapes_before_it_are_known(name, dtype):
    raw, model = make_params(name, dtype), MODELS[name]
    prepared = prepare(raw, model, "native")
    again = prepare(prepared, model, "native")
    assert again is prepared
    assert_equal(jax.jit(lambda params: prepare(params, model, "native"))(raw), prepared)
    for given in (raw, prepared):
        shapes = unprepared(given, model)
        assert jax.tree.structure(shapes) == jax.tree.structure(raw)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(raw)
        ]


def test_other_backends_and_float16_keep_their_parameters():
    raw, model = make_params("llama", "float32"), MODELS["llama"]
    for backend in ("reference", "triton", "tpu"):
        assert prepare(raw, model, backend) is raw
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), raw)
    for new, old in zip(jax.tree.leaves(prepare(half, model, "native")), jax.tree.leaves(half), strict=True):
        assert new is old


@dtypes
@pytest.mark.parametrize("name", ["llama", "llama, biases, tied"])
def test_preparing_and_freeing_gives_the_same_and_deletes_what_it_packed(name, dtype):
    model, expected = MODELS[name], prepare(make_params(name, dtype), MODELS[name], "native")
    mine = jax.tree.map(jnp.copy, make_params(name, dtype))
    prepared = prepare_and_free(mine, model, "native")
    assert_equal(prepared, expected)
    for path, old in leaves_with_paths(mine):
        assert old.is_deleted() == (packed_leaf(prepared, path) is not old)
    assert sum(leaf.is_deleted() for leaf in jax.tree.leaves(mine)) >= 4 * model.num_layers + 1


def test_a_parameter_that_has_no_packed_form_is_refused_by_name():
    params = jax.tree.map(jnp.copy, make_params("llama", "bfloat16"))
    params["blocks"][1]["router"] = nnx.Param(jnp.ones((48, 8), jnp.bfloat16))
    with pytest.raises(
        ValueError, match=r"parameter blocks\.1\.router has shape \(48, 8\) but .* has no such parameter"
    ):
        prepare(params, MODELS["llama"], "native")


def test_packed_parameters_are_refused_by_other_backends():
    packed = prepare(make_params("llama", "float32"), MODELS["llama"], "native")
    with pytest.raises(ValueError, match="prepared for native kernels, not for the backend 'reference'"):
        prepare(packed, MODELS["llama"], "reference")


@pytest.mark.parametrize("packed", [True, False])
@models
def test_greedy_tokens_and_logits_are_those_of_plain_jax_and_dense_attention(name, packed):
    """With weights that are not packed, as those of float16, native kernels do attention only."""
    model, raw = MODELS[name], make_params(name, "float32")
    sequences, logits = generate(prepare(raw, model, "native") if packed else raw, model, "float32")
    for sequence, length, found in zip(sequences, LENGTHS, logits, strict=True):
        assert len(sequence) == length + NUM_NEW and len(set(sequence[length:])) > 3
        padded = np.pad(np.array(sequence[:-1], np.int32), (0, 40 - len(sequence)))
        expected = np.asarray(dense_logits(raw, padded, model=model))[: len(found)]
        scale = np.abs(expected).max(axis=1)
        assert np.all(np.abs(np.array(found) - expected).max(axis=1) <= 1e-5 * scale)
        chosen = expected[np.arange(length - 1, len(found)), sequence[length:]]
        assert np.all(chosen >= expected.max(axis=1)[length - 1 :] - 1e-5 * scale[length - 1 :])


@pytest.mark.parametrize("name", ["llama, biases, tied", "qwen3, norms, window"])
def test_in_bfloat16_logits_are_those_of_plain_jax_but_for_rounding(name):
    """A number on the edge between two of bfloat16 may go either way, in each of some dozen products in a row."""
    model, raw = MODELS[name], make_params(name, "bfloat16")
    sequences, logits = generate(prepare(raw, model, "native"), model, "float32")
    for sequence, found in zip(sequences, logits, strict=True):
        padded = np.pad(np.array(sequence[:-1], np.int32), (0, 40 - len(sequence)))
        expected = np.asarray(dense_logits(raw, padded, model=model))[: len(found)]
        error = np.abs(np.array(found) - expected).max(axis=1) / np.abs(expected).max(axis=1)
        assert np.median(error) < 0.01 and error.max() < 0.04


def test_prepared_parameters_are_refused_with_another_attend():
    model = MODELS["llama"]
    with pytest.raises(ValueError, match="prepared for native kernels: use them with native.PagedBatch"):
        dense_logits(prepare(make_params("llama", "float32"), model, "native"), jnp.zeros(40, jnp.int32), model=model)


def test_the_loop_gives_the_same_bits_with_prepared_parameters():
    config = dataclasses.replace(workload.CONFIG, attention_backend="native")
    raw = workload.make_params()
    state = workload.start(workload.crowd(3, 8), config)
    loop = functools.partial(run, model=workload.MODEL, config=config, max_new_tokens=workload.MAX_NEW)
    program = jax.jit(loop, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    expected = jax.device_get(program(raw, state))
    found = jax.device_get(program(prepare(raw, workload.MODEL, "native"), state))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_engine_takes_raw_or_prepared_parameters_and_new_ones_in_between():
    config = EngineConfig(**small_model.CAPACITIES, attention_backend="native")
    model, (old, new) = small_model.MODEL, (small_model.make_params(seed) for seed in (0, 1))
    engine, of_new = Engine(old, model, config), Engine(prepare(new, model, "native"), model, config)
    prompts = [list(range(1, 30)), [5, 6]]

    def generate(engine: Engine) -> list:
        wanted = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
        results = [result.outputs[0] for result in engine.generate(prompts, wanted)]
        return [(result.token_ids, result.cumulative_logprob) for result in results]

    before = generate(engine)
    engine.set_params(new)
    assert generate(engine) == generate(of_new) != before
    engine.set_params(old)
    assert generate(engine) == before
    of_new.set_params(old)
    assert generate(of_new) == before
    assert not any(leaf.is_deleted() for params in (old, new) for leaf in jax.tree.leaves(params))
