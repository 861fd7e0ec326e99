"""Models with weights in int8: parameters prepared for them, logits, and the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import BeamParams, Engine, EngineConfig, SamplingParams, prepare, run
from jaxserve.models.params import leaves_with_paths
from jaxserve.models.prepare import loaded_dtype, prepare_and_free, unprepared
from pallas_kernels import native
from pallas_kernels.native import library
from tests import small_model, workload
from tests.pallas_kernels.native_models import (
    MODELS,
    assert_equal,
    dense_logits,
    generate,
    make_params,
    packed_leaf,
)

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

models = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["llama, biases, tied", "qwen3, norms, window"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
INT8 = {"attention_backend": "native", "weight_dtype": "int8"}


def by_columns(leaf: jax.Array, kind: str) -> jax.Array | None:
    """A weight with its output columns last; None: it is none."""
    if leaf.ndim == 1 or "bias" in kind:
        return None
    return leaf.T if kind in ("embedding", "lm_head") else leaf.reshape(leaf.shape[0], -1)


def each_weight(params: nnx.State, change) -> nnx.State:
    """`change` of every weight by columns, in the weight's own shape."""

    def changed(path: tuple, leaf: jax.Array) -> jax.Array:
        columns = by_columns(leaf, path[-1])
        if columns is None:
            return leaf
        new = change(columns.astype(jnp.float32)).astype(leaf.dtype)
        return new.T if path[-1] in ("embedding", "lm_head") else new.reshape(leaf.shape)

    return jax.tree.unflatten(jax.tree.structure(params), [changed(*leaf) for leaf in leaves_with_paths(params)])


def dequantised(w: jax.Array) -> jax.Array:
    integers, scale = native.quantize(w)
    return integers.astype(jnp.float32) * scale[None]


def representable(w: jax.Array) -> jax.Array:
    """A weight near this one whose scales are powers of two, so that int8 and bfloat16 hold it exactly."""
    scale = 2.0 ** np.ceil(np.log2(np.abs(np.asarray(w)).max(axis=0) / 127))
    integers = np.round(np.asarray(w) / scale)
    largest = np.abs(integers).argmax(axis=0), np.arange(w.shape[1])
    integers[largest] = 127 * np.sign(integers[largest])
    return jnp.asarray(integers * scale, jnp.float32)


@dtypes
@models
def test_preparing_quantises_what_is_packed_and_widens_the_rest(name, dtype):
    raw, model = make_params(name, dtype), MODELS[name]
    prepared = prepare(raw, model, "native", "int8")
    pack, pack_gated = jax.jit(native.pack_int8), jax.jit(native.pack_int8_gated)
    num_packed = 0
    for path, old in leaves_with_paths(raw):
        kind, new = path[-1], packed_leaf(prepared, path)
        if kind in ("qkv", "out", "down"):
            expected = pack(old)
        elif kind == "gate_up":
            expected = pack_gated(old)
        elif kind == "lm_head" or (kind == "embedding" and model.tied_embeddings):
            expected = pack(old.T)
        else:
            expected = old if kind == "embedding" else old.astype(jnp.float32)
        assert (new.dtype, new.shape) == (expected.dtype, expected.shape), path
        np.testing.assert_array_equal(np.asarray(new), np.asarray(expected))
        num_packed += new.dtype == jnp.int8
    assert num_packed == 4 * model.num_layers + 1


@dtypes
@some_models
def test_preparing_again_changes_nothing_and_shapes_before_it_are_known(name, dtype):
    raw, model = make_params(name, dtype), MODELS[name]
    prepared = prepare(raw, model, "native", "int8")
    again = prepare(prepared, model, "native", "int8")
    assert again is prepared
    assert_equal(jax.jit(lambda params: prepare(params, model, "native", "int8"))(raw), prepared)
    assert_equal(prepare_and_free(jax.tree.map(jnp.copy, raw), model, "native", "int8"), prepared)
    for given in (raw, prepared):
        assert loaded_dtype(given) == dtype
        shapes = unprepared(given, model)
        assert jax.tree.structure(shapes) == jax.tree.structure(raw)
        for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(raw), strict=True):
            assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_what_does_not_go_together_is_refused():
    raw, model = make_params("llama", "bfloat16"), MODELS["llama"]
    with pytest.raises(
        ValueError, match="weight_dtype='int8' needs the backend 'native', not 'reference': leave it out"
    ):
        prepare(raw, model, "reference", "int8")
    with pytest.raises(ValueError, match="prepared with weight_dtype=None, not with weight_dtype='int8'"):
        prepare(prepare(raw, model, "native"), model, "native", "int8")
    with pytest.raises(ValueError, match="prepared with weight_dtype='int8', not with weight_dtype=None"):
        prepare(prepare(raw, model, "native", "int8"), model, "native")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), raw)
    with pytest.raises(ValueError, match="float16 weights have no weight_dtype='int8': load them in bfloat16"):
        prepare(half, model, "native", "int8")
    with pytest.raises(ValueError, match="weight_dtype='int8' needs the backend 'native'.* leave weight_dtype out"):
        Engine(half, model, EngineConfig(weight_dtype="int8"))
    with pytest.raises(ValueError, match="float16 weights.* use 'reference', without weight_dtype='int8'"):
        Engine(half, model, EngineConfig(**INT8, kv_dtype="bfloat16"))


@models
def test_weights_that_int8_holds_exactly_give_the_bits_of_bfloat16(name):
    model, raw = MODELS[name], each_weight(make_params(name, "bfloat16"), representable)
    tokens, expected = generate(prepare(raw, model, "native"), model, "float32")
    found_tokens, found = generate(prepare(raw, model, "native", "int8"), model, "float32")
    assert found_tokens == tokens
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


@some_models
def test_logits_are_those_of_plain_jax_with_the_rounded_weights(name):
    """But for activations rounded to bfloat16; and those of the weights before that, but for half a percent per product.

    A scale is a 127th of some 2.5 standard deviations of a column, a rounding error a sqrt(12)th of that: 0.6 percent. A dozen
    of products in a row make 2 percent, and so do the largest of a hundred errors beside the largest of a hundred logits.
    Attention far from uniform makes some rows worse.
    """
    model, raw = MODELS[name], make_params(name, "float32")
    sequences, logits = generate(prepare(raw, model, "native", "int8"), model, "float32")
    rounded = each_weight(raw, dequantised)
    if not model.tied_embeddings:
        rounded["embedding"] = raw["embedding"]
    for sequence, found in zip(sequences, logits, strict=True):
        padded = np.pad(np.array(sequence[:-1], np.int32), (0, 40 - len(sequence)))
        for params, median, largest in ((rounded, 0.01, 0.04), (raw, 0.05, 0.2)):
            expected = np.asarray(dense_logits(params, padded, model=model))[: len(found)]
            error = np.abs(np.array(found) - expected).max(axis=1) / np.abs(expected).max(axis=1)
            assert np.median(error) < median and error.max() < largest


PROMPTS = [list(range(1, 30)), [5, 6], [9] * 20, list(range(40, 50))]


def completions(engine: Engine, prompts: list[list[int]]) -> list[tuple]:
    wanted = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    results = [result.outputs[0] for result in engine.generate(prompts, wanted)]
    return [(result.token_ids, result.cumulative_logprob) for result in results]


@functools.cache
def make_engine() -> Engine:
    return Engine(small_model.make_params(), small_model.MODEL, EngineConfig(**small_model.CAPACITIES, **INT8))


def test_an_engine_gives_a_request_the_same_alone_and_beside_others():
    engine = make_engine()
    crowded = completions(engine, PROMPTS)
    assert [completions(engine, [prompt])[0] for prompt in PROMPTS] == crowded
    plain = Engine(small_model.make_params(), small_model.MODEL, EngineConfig(**small_model.CAPACITIES))
    exact = completions(plain, PROMPTS)
    assert crowded != exact
    for (_, logprob), (_, other) in zip(crowded, exact, strict=True):
        assert logprob == pytest.approx(other, rel=0.1)


def test_beams_run_on_int8_weights_and_one_beam_is_the_greedy_text():
    engine = make_engine()
    wanted = BeamParams(width=1, max_tokens=8, eos_token_ids=())
    for prompt, (tokens, _) in zip(PROMPTS, completions(engine, PROMPTS), strict=True):
        (found,) = engine.beam_search([prompt], wanted)
        assert found.sequences[0].token_ids == tokens


def test_the_loop_gives_the_same_bits_with_prepared_parameters():
    config = dataclasses.replace(workload.CONFIG, **INT8)
    raw = workload.make_params()
    state = workload.start(workload.crowd(3, 8), config)
    loop = functools.partial(run, model=workload.MODEL, config=config, max_new_tokens=workload.MAX_NEW)
    program = jax.jit(loop, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    expected = jax.device_get(program(raw, state))
    found = jax.device_get(program(prepare(raw, workload.MODEL, "native", "int8"), state))
    assert np.asarray(found[1].num_generated).sum() > 20
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_weights_come_as_they_were_loaded_and_are_quantised():
    config, model = EngineConfig(**small_model.CAPACITIES, **INT8), small_model.MODEL
    old, new = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_model.make_params(seed)) for seed in (0, 1))
    engine, of_new = Engine(old, model, config), Engine(prepare(new, model, "native", "int8"), model, config)
    assert engine.config == of_new.config and engine.config.kv_dtype == "bfloat16"
    before = completions(engine, PROMPTS[:2])
    engine.set_params(new)
    assert completions(engine, PROMPTS[:2]) == completions(of_new, PROMPTS[:2]) != before
    of_new.set_params(old)
    assert completions(of_new, PROMPTS[:2]) == before
    with pytest.raises(ValueError, match="is float32.*, but the engine was made for bfloat16"):
        of_new.set_params(small_model.make_params())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_quantised_as_it_is_loaded_and_keeps_the_dtype_of_its_pages(tmp_path, dtype):
    directory = small_model.write_checkpoint(tmp_path)
    config = EngineConfig(**small_model.CAPACITIES, weight_dtype="int8")
    engine = Engine.from_pretrained(str(directory), dtype=dtype, config=config)
    assert (engine.config.kv_dtype, engine.config.weight_dtype) == (dtype, "int8")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), small_model.make_params())
    expected = Engine(params, small_model.MODEL, config)
    assert completions(engine, PROMPTS[:2]) == completions(expected, PROMPTS[:2])


def test_weights_that_are_not_finite_end_a_request_with_an_error():
    params = small_model.make_params()
    down = params["blocks"][0]["ffw"]["down"]
    down[...] = down[...].at[3, 4].set(jnp.inf)
    engine = Engine(params, small_model.MODEL, EngineConfig(**small_model.CAPACITIES, **INT8))
    (result,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    assert result.outputs[0].finish_reason == "error"


def test_parameters_of_several_dtypes_are_refused():
    """The dtype that they were loaded in would not be known afterwards."""
    name = next(iter(MODELS))
    raw = make_params(name, "bfloat16")
    leaves = [leaf.astype(jnp.float32) if leaf.ndim == 1 else leaf for leaf in jax.tree.leaves(raw)]
    mixed = jax.tree.unflatten(jax.tree.structure(raw), leaves)
    with pytest.raises(ValueError, match="for parameters of one dtype, but .* is float32 beside bfloat16"):
        prepare(mixed, MODELS[name], "native", "int8")
