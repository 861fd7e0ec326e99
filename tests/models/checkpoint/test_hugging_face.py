"""Parameters loaded from a Hugging Face checkpoint equal the stored ones; tensors that do not fit are refused by name."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from jaxserve.models import ModelConfig, Transformer, graphdef_of
from jaxserve.models.checkpoint.hugging_face import CheckpointError, load_hugging_face, save_hugging_face
from jaxserve.models.families.hugging_face import read_model_config
from jaxserve.models.params import random_params
from tests.models import zoo
from tests.models.tiny import CONFIG, Q_PROJ, SINGLE, TIED, assert_equal, assert_refused, randomised, rewrite


def test_parameters_have_the_structure_of_a_model_made_here(saved):
    graphdef, made = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    loaded = load_hugging_face(saved, dtype=jnp.float32)
    assert jax.tree.structure(loaded) == jax.tree.structure(made)
    assert graphdef == graphdef_of(CONFIG)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_saving_and_loading_is_the_identity(config, dtype, tmp_path):
    params = randomised(config, dtype)
    save_hugging_face(params, config, tmp_path, dtype)
    assert read_model_config(tmp_path) == config
    assert_equal(load_hugging_face(tmp_path, dtype=dtype), params)


@pytest.mark.parametrize("name", ["llama-biases-group4-dim20-linear", "qwen2-tied-group7-dim6"])
def test_saving_what_was_loaded_restores_every_tensor_of_transformers(name, zoo_references, tmp_path):
    reference = zoo_references(next(case for case in zoo.CASES if case.name == name))
    config = read_model_config(reference.directory)
    save_hugging_face(load_hugging_face(reference.directory, dtype=jnp.float32), config, tmp_path, jnp.float32)
    ours, theirs = (safetensors.numpy.load_file(d / SINGLE) for d in (tmp_path, reference.directory))
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        np.testing.assert_array_equal(ours[tensor], expected, err_msg=tensor)


def test_transformers_loads_what_is_saved(reference, tmp_path):
    config = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    save_hugging_face(params, config, tmp_path, "float32", extra_config={"eos_token_id": 7})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation="eager")
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, reference.model(tokens).logits, rtol=0, atol=1e-4)
    assert model.dtype == torch.float32 and model.config.eos_token_id == 7 and model.config.bos_token_id is None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_stored_dtype_is_read_as_every_dtype(stored, dtype, tmp_path):
    model = zoo.build(zoo.CASES[0], tmp_path, stored)
    params = load_hugging_face(tmp_path, dtype=dtype)
    as_torch = {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}[dtype]
    expected = model.model.embed_tokens.weight.detach().to(as_torch).float().numpy()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(np.asarray(params.embedding[...].astype(jnp.float32)), expected)


def test_the_fused_kernel_is_grouped_by_kv_head(saved):
    tensors = safetensors.numpy.load_file(saved / SINGLE)
    params = load_hugging_face(saved, dtype=jnp.float32)
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    rows = [q[0:12], k[0:6], v[0:6], q[12:24], k[6:12], v[6:12]]
    np.testing.assert_array_equal(params.blocks[1].attention.qkv[...], np.concatenate(rows).T)
    gate, up = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    np.testing.assert_array_equal(params.blocks[1].ffw.gate_up[...], np.stack([gate.T, up.T], axis=1))


def test_a_given_config_takes_the_place_of_the_file(saved):
    (saved / "config.json").unlink()
    load_hugging_face(saved, CONFIG, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_hugging_face(saved, dtype=jnp.float32)


def test_parameters_can_be_donated(saved):
    params = load_hugging_face(saved, dtype=jnp.float32)
    jax.jit(lambda params: jax.tree.map(lambda leaf: leaf * 2, params), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_sharding_may_be_one_or_a_function_or_a_tree(saved):
    mesh = jax.make_mesh((min(2, jax.device_count()),), ("kv_heads",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_head = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "kv_heads"))
    params = load_hugging_face(saved, dtype=jnp.float32, sharding=whole)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {whole}

    def place(path, leaf):
        assert leaf.dtype == jnp.float32
        return by_head if path[-1] == "qkv" else whole

    chosen = load_hugging_face(saved, dtype=jnp.float32, sharding=place)
    assert chosen.blocks[1].attention.qkv[...].sharding == by_head and chosen.embedding[...].sharding == whole
    tree = jax.tree.map(lambda leaf: leaf.sharding, chosen)
    assert_equal(load_hugging_face(saved, dtype=jnp.float32, sharding=tree), params)
    assert random_params(CONFIG, 0, jnp.float32, sharding=place).blocks[0].attention.qkv[...].sharding == by_head


def test_derived_and_tied_tensors_are_harmless(tmp_path):
    save_hugging_face(randomised(TIED), TIED, tmp_path, jnp.bfloat16)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    expected = load_hugging_face(tmp_path, dtype=jnp.float32)
    rewrite(tmp_path, change)
    assert_equal(load_hugging_face(tmp_path, dtype=jnp.float32), expected)


def test_code_and_pickles_beside_the_weights_are_never_run(saved):
    trap = "raise SystemExit('code of the checkpoint was run')\n"
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "conftest.py",
    ):
        (saved / name).write_text(trap)
    (saved / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(I1\ntR.")
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (saved / "config.json").write_text(json.dumps(config))
    modules = set(sys.modules)
    load_hugging_face(saved, dtype=jnp.float32)
    assert not [name for name in set(sys.modules) - modules if "evil" in name]


def test_heavy_libraries_are_imported_on_first_use_only():
    code = (
        "import sys, jaxserve.models.checkpoint.hugging_face, jaxserve.models.checkpoint.orbax;"
        "heavy = ('torch', 'transformers', 'orbax.checkpoint', 'huggingface_hub');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


_MEASURE = """
import sys
import jax, jax.numpy as jnp
from jaxserve.models.checkpoint.hugging_face import load_hugging_face
from jaxserve.models.families.hugging_face import read_model_config
from jaxserve.models.params import abstract_params

def peak_bytes():  # not ru_maxrss, which begins at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

abstract_params(read_model_config(sys.argv[1]), jnp.bfloat16)
jax.device_put(jnp.ones(3)).block_until_ready()
before = peak_bytes()
params = load_hugging_face(sys.argv[1], dtype=jnp.bfloat16)
print((peak_bytes() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_never_holds_a_second_copy_of_the_model(tmp_path):
    config = ModelConfig("llama", 1000, 512, 2048, 24, num_heads=8, num_kv_heads=4, head_dim=64)
    save_hugging_face(random_params(config, 0, jnp.bfloat16), config, tmp_path, jnp.bfloat16)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 < float(result.stdout) < 1.5


def test_a_missing_directory_is_named(tmp_path):
    assert_refused(tmp_path / "absent", "absent", "is not a directory")


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(saved, str(saved), Q_PROJ, "1 tensor")


def test_a_missing_output_projection_points_to_tying(saved):
    rewrite(saved, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(saved, "lm_head.weight", "tie_word_embeddings")


def test_a_tensor_without_place_is_named(saved):
    rewrite(
        saved,
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}),
    )
    assert_refused(saved, "q_proj.bias", "qwen3")


def test_a_tied_output_projection_that_differs_is_named(tmp_path):
    save_hugging_face(randomised(TIED), TIED, tmp_path, jnp.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    assert_refused(tmp_path, "lm_head.weight", "differs", "tie_word_embeddings")


def test_a_wrong_shape_is_named(saved):
    rewrite(saved, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].T.copy()}))
    assert_refused(saved, Q_PROJ, "[16, 24]", "[24, 16]")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_a_stored_dtype_other_than_three_is_named(dtype, saved):
    rewrite(saved, lambda tensors: tensors.update({Q_PROJ: np.ones((24, 16), dtype)}))
    assert_refused(saved, Q_PROJ, {"int8": "I8", "float64": "F64"}.get(np.dtype(dtype).name, "F8_E4M3"), "BF16")


def test_a_value_too_large_for_float16_is_named(saved):
    rewrite(saved, lambda tensors: tensors[Q_PROJ].fill(1e6))
    assert_refused(saved, Q_PROJ, "float16", "bfloat16", dtype=jnp.float16)
    load_hugging_face(saved, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["int8", jnp.float64, "half-ish", None])
def test_another_dtype_of_parameters_is_refused(dtype, saved):
    with pytest.raises(ValueError, match="use float32, bfloat16 or float16"):
        load_hugging_face(saved, dtype=dtype)


def test_saving_refuses_parameters_of_another_config(tmp_path):
    wider = dataclasses.replace(CONFIG, ffw_dim=32)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.ffw\.down has shape \(24, 16\) but a model of this config makes it \(32, 16\)"
    ):
        save_hugging_face(randomised(CONFIG), wider, tmp_path, jnp.float32)
    with pytest.raises(ValueError, match="lm_head"):
        save_hugging_face(randomised(CONFIG), TIED, tmp_path, jnp.float32)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_no_file(tmp_path):
    params = jax.tree.map(lambda leaf: leaf * 1e6, randomised(CONFIG))
    with pytest.raises(CheckpointError, match="float16"):
        save_hugging_face(params, CONFIG, tmp_path, jnp.float16)
    assert not list(tmp_path.iterdir())


def test_extra_config_may_not_contradict_the_model(tmp_path):
    with pytest.raises(ValueError, match="'vocab_size'"):
        save_hugging_face(randomised(CONFIG), CONFIG, tmp_path, jnp.float32, extra_config={"vocab_size": 3})
