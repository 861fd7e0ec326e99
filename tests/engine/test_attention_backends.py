"""The Engine on every attention backend: the same tokens as with the plain one, and a clear error where one cannot run."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve import Engine, EngineConfig, SamplingParams
from jaxserve.core.programs import GPU_COMPILER_OPTIONS, programs
from jaxserve.engine.capacity import resolve_capacities
from pallas_kernels.backend import check_runs_here, resolve_backend
from tests import small_model
from tests.command_line import run

CONFIG = EngineConfig(**{**small_model.CAPACITIES, "num_pages": 13})
INTERPRETED = dataclasses.replace(CONFIG, interpret_kernels=True)
TIE = 1e-5  # of the largest score, as for transformers: closer than this, rounding decides


def prompts() -> list[list[int]]:
    """Returns more prompts than there are slots, some longer than a chunk, together too long for the pool."""
    rng = np.random.default_rng(5)
    lengths = [30, 5, 1, 41, 17, 28, 12]
    return [rng.integers(1, small_model.MODEL.vocab_size, length).tolist() for length in lengths]


def generate(config: EngineConfig) -> tuple[list, int]:
    engine = Engine(small_model.make_params(), small_model.MODEL, config)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
    return [result.outputs[0] for result in engine.generate(prompts(), params)], engine.stats.num_preemptions


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_greedy_tokens_are_those_of_the_plain_backend(backend):
    expected, _ = generate(dataclasses.replace(CONFIG, attention_backend="reference"))
    actual, num_preemptions = generate(dataclasses.replace(INTERPRETED, attention_backend=backend))
    assert num_preemptions > 0
    num_ties = 0
    for seen, wanted in zip(actual, expected, strict=True):
        for place, (token, other) in enumerate(zip(seen.token_ids, wanted.token_ids, strict=True)):
            if token != other:  # allowed only where the plain backend's two best are equal but for rounding
                best, second = sorted((t.logprob for t in wanted.logprobs[place].values()), reverse=True)[:2]
                assert best - second < TIE * abs(best)
                num_ties += 1
                break
        np.testing.assert_allclose(seen.cumulative_logprob, wanted.cumulative_logprob, atol=1e-3)
    print(f"{backend}: {num_ties} of {len(actual)} differ from a tie on")
    assert num_ties <= 1


@pytest.mark.slow
def test_the_command_line_runs_the_kernels_interpreted(checkpoint):
    asked = ("--prompt", "the cat sat on", "--temperature=0", "--max_tokens=6", "--ignore_eos")
    plain = run(checkpoint, *asked)
    kernels = run(checkpoint, *asked, "--attention_backend=triton", "--interpret_kernels")
    assert kernels.returncode == 0, kernels.stderr
    assert kernels.stdout == plain.stdout


def test_the_command_line_refuses_a_backend_that_cannot_run(checkpoint):
    done = run(checkpoint, "--prompt", "x", "--attention_backend=triton")
    assert done.returncode == 1
    assert "'triton' needs an NVIDIA GPU, but the weights are on a cpu: use 'reference'" in done.stderr


@pytest.mark.parametrize(("backend", "device"), [("triton", "an NVIDIA GPU"), ("tpu", "a TPU")])
def test_the_engine_refuses_a_backend_that_cannot_run(backend, device):
    with pytest.raises(ValueError, match=f"{backend}.* needs {device}.*use 'reference', or interpret the kernels"):
        Engine(small_model.make_params(), small_model.MODEL, dataclasses.replace(CONFIG, attention_backend=backend))


def test_jax_triton_is_not_interpreted():
    with pytest.raises(ValueError, match="'jax_triton' needs an NVIDIA GPU.*use 'reference'$"):
        check_runs_here("jax_triton", interpret=True)


@pytest.mark.parametrize(("reason", "backend"), [(None, "native"), ("no C++ compiler found", "reference")])
def test_the_default_on_cpu_is_native_code_where_it_can_be_built(caplog, monkeypatch, reason, backend):
    monkeypatch.setattr("pallas_kernels.native.library.why_not", lambda: reason)
    assert resolve_backend(None) == CONFIG.backend == backend
    check_runs_here("reference", interpret=False)
    with caplog.at_level("INFO", logger="jaxserve"):
        engine = Engine(small_model.make_params(), small_model.MODEL, CONFIG)
    assert engine.config.attention_backend == backend
    assert f"attention: {backend}" in caplog.text
    if reason:
        with pytest.raises(ValueError, match="'native' cannot run here: no C\\+\\+ compiler found; or use 'reference'"):
            check_runs_here("native", interpret=False)


@pytest.mark.parametrize(("head_dim", "backend"), [(128, "tpu"), (256, "tpu"), (64, "reference"), (8, "reference")])
def test_on_tpus_narrow_heads_are_left_to_the_plain_backend(monkeypatch, head_dim, backend):
    monkeypatch.setattr("jaxserve.engine.capacity.platform_of", lambda _: "tpu")
    model = dataclasses.replace(small_model.MODEL, head_dim=head_dim)
    assert resolve_capacities(CONFIG, model, small_model.make_params()).attention_backend == backend


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend 'cuda' is unknown: use one of reference, native, triton"):
        resolve_backend("cuda")


def test_the_pool_is_kept_as_bits_only_where_the_plain_backend_writes_it_on_cpu():
    config = dataclasses.replace(CONFIG, kv_dtype="bfloat16")
    stored = {}
    for backend in ("reference", "triton"):
        engine = Engine(
            small_model.make_params(),
            small_model.MODEL,
            dataclasses.replace(config, attention_backend=backend, interpret_kernels=True),
        )
        stored[backend] = str(engine.driver.state.pool.k[0].dtype)
    assert stored == {"reference": "uint16", "triton": "bfloat16"}


def test_programs_for_a_gpu_are_compiled_with_loops_in_cuda_graphs(monkeypatch):
    options = []
    original = jax.jit
    monkeypatch.setattr(
        jax, "jit", lambda *args, **kwargs: options.append(kwargs["compiler_options"]) or original(*args)
    )
    config = dataclasses.replace(CONFIG, max_slots=3, kv_dtype="float32")
    programs(small_model.MODEL, dataclasses.replace(config, attention_backend="triton"))
    programs(small_model.MODEL, dataclasses.replace(config, attention_backend="reference"))
    assert options == [GPU_COMPILER_OPTIONS] * 3 + [None] * 3
    assert "WHILE" in GPU_COMPILER_OPTIONS["xla_gpu_enable_command_buffer"].split(",")
