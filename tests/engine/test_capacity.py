"""The capacities that are chosen for a machine and a model where the configuration leaves them open."""

import dataclasses

import jax
import pytest

from jaxserve import BeamParams, Engine, EngineConfig, search_beams
from jaxserve.core.programs import compiler_options
from jaxserve.engine.capacity import resolve_capacities
from pallas_kernels.backend import compiles_for_cuda
from tests import small_model

CONFIG = EngineConfig(max_slots=2, page_size=8, attention_backend="reference")


@pytest.mark.parametrize(("max_position", "longest"), [(128, 128), (4096, 2048)])
def test_the_longest_sequence_is_by_default_2048_tokens_or_what_the_model_was_made_for(max_position, longest):
    model = dataclasses.replace(small_model.MODEL, max_position=max_position)
    assert (CONFIG.max_model_len, CONFIG.max_sequence_len) == (None, 2048)
    resolved = resolve_capacities(CONFIG, model, small_model.make_params())
    assert (resolved.max_model_len, resolved.max_sequence_len) == (longest, longest)


@pytest.mark.parametrize("length", [129, 2048])
def test_a_longest_sequence_above_the_models_is_refused_whatever_its_value(length):
    config = dataclasses.replace(CONFIG, max_model_len=length)
    with pytest.raises(ValueError, match=f"max_model_len={length} is longer than the 128 positions .* or leave it out"):
        resolve_capacities(config, small_model.MODEL, small_model.make_params())


@pytest.mark.parametrize(
    ("default", "weights_on", "backend"),
    [("gpu", "cpu", "native"), ("cpu", "gpu", "triton"), ("cpu", "tpu", "tpu"), ("tpu", "rocm", "reference")],
)
def test_the_backend_is_chosen_by_where_the_weights_are_and_not_by_jaxs_default(
    monkeypatch, default, weights_on, backend
):
    monkeypatch.setattr(jax, "default_backend", lambda: default)
    monkeypatch.setattr("jaxserve.engine.capacity.platform_of", lambda _: weights_on)
    monkeypatch.setattr("pallas_kernels.native.library.why_not", lambda: None)
    model = dataclasses.replace(small_model.MODEL, head_dim=128)
    config = dataclasses.replace(CONFIG, attention_backend=None)
    resolved = resolve_capacities(config, model, small_model.make_params())
    assert resolved.attention_backend == resolved.backend == backend
    assert compiles_for_cuda(backend, weights_on) == (weights_on == "gpu")


def test_a_backend_that_does_not_run_where_the_weights_are_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="'triton' needs an NVIDIA GPU, but the weights are on a cpu: use 'reference'"):
        resolve_capacities(
            dataclasses.replace(CONFIG, attention_backend="triton"), small_model.MODEL, small_model.make_params()
        )


def test_weights_on_a_cpu_are_served_beside_another_default_platform(monkeypatch):
    """What jax.default_backend says is asked nowhere: the pool is kept as bits, no program gets options for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = EngineConfig(**small_model.CAPACITIES | {"kv_dtype": "bfloat16", "attention_backend": "reference"})
    engine = Engine(small_model.make_params(), small_model.MODEL, config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(engine.driver.state.pool)} == {"uint16"}
    assert compiler_options(engine.config, "cpu") is None and compiler_options(engine.config) is not None


def test_beams_are_searched_where_the_weights_are(monkeypatch):
    monkeypatch.setattr("pallas_kernels.native.library.why_not", lambda: "not here")
    fields = {"params": small_model.make_params(), "model": small_model.MODEL, "config": CONFIG}
    expected = search_beams([[1, 2]], BeamParams(width=2, max_tokens=3), **fields)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fields["config"] = dataclasses.replace(CONFIG, attention_backend=None)
    assert search_beams([[1, 2]], BeamParams(width=2, max_tokens=3), **fields) == expected
