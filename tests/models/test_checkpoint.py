"""Checkpoints: what is loaded is what was stored, and whatever is wrong with the files is said in one sentence."""

import dataclasses
import json
import pathlib
import struct
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from huggingface_hub import errors

from jaxserve.models import ModelConfig, Transformer, graphdef_of
from jaxserve.models.checkpoint import CheckpointError, load_hugging_face, resolve_model, save_hugging_face
from jaxserve.models.families import read_model_config
from jaxserve.models.orbax_checkpoint import load_orbax, save_orbax
from jaxserve.models.params import abstract_params, leaves_with_paths, random_params
from tests.models import zoo

CONFIG = ModelConfig(
    "qwen3", 50, 16, 24, 2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, windows=(None, 4)
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def randomised(config: ModelConfig, dtype=jnp.float32) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32).astype(dtype),
        abstract_params(config, dtype),
    )


def assert_equal(actual: nnx.State, expected: nnx.State) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves_with_paths(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    """A directory with an untied checkpoint of CONFIG."""
    save_hugging_face(randomised(CONFIG), CONFIG, tmp_path / "model", jnp.float32)
    return tmp_path / "model"


def rewrite(directory: pathlib.Path, change) -> None:
    """Applies `change` to the dict of tensors of the single file."""
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def shard(directory: pathlib.Path) -> dict:
    """Splits the single file in two and returns its index."""
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.numpy.save_file(part, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def refusal(directory, *words: str, dtype=jnp.float32) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(directory, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# What is loaded


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
    save_hugging_face(
        load_hugging_face(reference.directory, dtype=jnp.float32), config, tmp_path, jnp.float32
    )
    ours, theirs = (safetensors.numpy.load_file(d / SINGLE) for d in (tmp_path, reference.directory))
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        np.testing.assert_array_equal(ours[tensor], expected, err_msg=tensor)


def test_transformers_loads_what_is_saved(reference, tmp_path):
    config = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    save_hugging_face(params, config, tmp_path, "float32", extra_config={"eos_token_id": 7})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", attn_implementation="eager"
    )
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(tokens).logits, reference.model(tokens).logits, rtol=0, atol=1e-4
        )
    assert (
        model.dtype == torch.float32 and model.config.eos_token_id == 7 and model.config.bos_token_id is None
    )


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


def test_a_sharded_checkpoint_is_one_model(saved):
    expected = load_hugging_face(saved, dtype=jnp.float32)
    shard(saved)
    assert_equal(load_hugging_face(saved, dtype=jnp.float32), expected)


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
    mesh = jax.make_mesh((1,), ("kv_heads",), axis_types=(jax.sharding.AxisType.Auto,))
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
    assert (
        random_params(CONFIG, 0, jnp.float32, sharding=place).blocks[0].attention.qkv[...].sharding == by_head
    )


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
        "import sys, jaxserve.models.checkpoint, jaxserve.models.orbax_checkpoint, jaxserve.models.families;"
        "print([name for name in ('torch', 'transformers', 'orbax.checkpoint', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What is refused


def test_a_missing_directory_is_named(tmp_path):
    refusal(tmp_path / "absent", "absent", "is not a directory")


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.pop(Q_PROJ))
    refusal(saved, str(saved), Q_PROJ, "1 tensor")


def test_a_missing_output_projection_points_to_tying(saved):
    rewrite(saved, lambda tensors: tensors.pop("lm_head.weight"))
    refusal(saved, "lm_head.weight", "tie_word_embeddings")


def test_a_tensor_without_place_is_named(saved):
    rewrite(
        saved,
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}),
    )
    refusal(saved, "q_proj.bias", "qwen3")


def test_a_tied_output_projection_that_differs_is_named(tmp_path):
    save_hugging_face(randomised(TIED), TIED, tmp_path, jnp.float32)
    rewrite(
        tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    )
    refusal(tmp_path, "lm_head.weight", "differs", "tie_word_embeddings")


def test_a_wrong_shape_is_named(saved):
    rewrite(saved, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].T.copy()}))
    refusal(saved, Q_PROJ, "[16, 24]", "[24, 16]")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_a_stored_dtype_other_than_three_is_named(dtype, saved):
    rewrite(saved, lambda tensors: tensors.update({Q_PROJ: np.ones((24, 16), dtype)}))
    refusal(saved, Q_PROJ, {"int8": "I8", "float64": "F64"}.get(np.dtype(dtype).name, "F8_E4M3"), "BF16")


def test_a_value_too_large_for_float16_is_named(saved):
    rewrite(saved, lambda tensors: tensors[Q_PROJ].fill(1e6))
    refusal(saved, Q_PROJ, "float16", "bfloat16", dtype=jnp.float16)
    load_hugging_face(saved, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["int8", jnp.float64, "half-ish", None])
def test_another_dtype_of_parameters_is_refused(dtype, saved):
    with pytest.raises(ValueError, match="use float32, bfloat16 or float16"):
        load_hugging_face(saved, dtype=dtype)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(num_bytes, saved):
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(content[:num_bytes])
    refusal(saved, str(saved / SINGLE), "not a complete safetensors file")


def header_of(path: pathlib.Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[Q_PROJ].update(data_offsets=[0, 4]),
        lambda header: header[Q_PROJ].update(data_offsets=[-4, 1532]),
        lambda header: header[Q_PROJ].update(dtype="F32X"),
        lambda header: header[Q_PROJ].update(shape=[24, 1 << 62]),
        lambda header: header.update({Q_PROJ: 3}),
    ],
    ids=["offsets", "negative offset", "dtype", "overflowing shape", "not an object"],
)
def test_a_damaged_header_is_refused(change, saved):
    header, data = header_of(saved / SINGLE)
    change(header)
    text = json.dumps(header).encode()
    (saved / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    refusal(saved, str(saved / SINGLE))


def test_a_header_that_claims_to_be_huge_is_refused(saved):
    (saved / SINGLE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refusal(saved, str(saved / SINGLE))


def test_pickles_are_refused_with_the_remedy(saved):
    (saved / SINGLE).rename(saved / "pytorch_model.bin")
    refusal(saved, "pytorch_model.bin", "pickle", "save_pretrained")


def test_a_directory_without_weights_is_named(saved):
    (saved / SINGLE).unlink()
    refusal(saved, str(saved), SINGLE, INDEX)


@pytest.mark.parametrize(
    "file",
    [
        "../model-00001.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "evil.bin",
        3,
        "",
    ],
)
def test_an_index_may_name_files_of_its_directory_only(file, saved):
    index = shard(saved)
    index["weight_map"][Q_PROJ] = file
    (saved / INDEX).write_text(json.dumps(index))
    refusal(saved, INDEX, repr(file), str(saved))


def test_an_index_that_names_an_absent_file_is_refused(saved):
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    refusal(saved, "model-00002-of-00002.safetensors", "does not exist")


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused(saved):
    index = shard(saved)
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {
        index["weight_map"][Q_PROJ]
    }
    index["weight_map"][Q_PROJ] = other.pop()
    (saved / INDEX).write_text(json.dumps(index))
    refusal(saved, INDEX, Q_PROJ, index["weight_map"][Q_PROJ])


def test_an_index_that_omits_a_tensor_does_not_hide_it(saved):
    index = shard(saved)
    part = saved / index["weight_map"][Q_PROJ]
    safetensors.numpy.save_file(safetensors.numpy.load_file(part) | {"extra": np.ones(2, np.float32)}, part)
    refusal(saved, "extra")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000]
)
def test_a_malformed_index_is_named(content, saved):
    shard(saved)
    (saved / INDEX).write_text(content)
    refusal(saved, str(saved / INDEX))


def test_saving_refuses_parameters_of_another_config(tmp_path):
    wider = dataclasses.replace(CONFIG, ffw_dim=32)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.ffw\.down has shape \(24, 16\) but the config makes it \(32, 16\)"
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


# Hub


def test_a_directory_is_itself(saved):
    assert resolve_model(str(saved)) == saved


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../up", "/abs/olute", "", "org/na me"])
def test_neither_a_directory_nor_an_id_is_named(name):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_not_a_model(saved):
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(saved / SINGLE))


def test_a_hub_id_is_downloaded_without_pickles_and_code(monkeypatch, tmp_path):
    seen = {}

    def download(repo_id, *, allow_patterns, ignore_patterns):
        files = [
            "config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "merges.txt",
            "chat_template.jinja", "pytorch_model.bin", "modeling_evil.py", "README.md", "onnx/config.json",
            "original/consolidated.00.pth", "consolidated.safetensors", "evil.pkl",
        ]  # fmt: skip
        filtered = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        seen[repo_id] = list(filtered)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == tmp_path
    assert seen["HuggingFaceTB/SmolLM2-135M"] == [
        "config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "merges.txt", "chat_template.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("offline"), "check the network"),
        (errors.OfflineModeIsEnabled("offline"), "check the network"),
        (ConnectionError("no route"), "check the network"),
        ((errors.RepositoryNotFoundError, 404), "no such model"),
        ((errors.GatedRepoError, 403), "licence"),
    ],
    ids=lambda value: "",
)
def test_a_failed_download_is_one_sentence(error, words, monkeypatch):
    def download(*_, **__):
        if isinstance(error, tuple):
            raise error[0].__new__(error[0])
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/name")
    message = str(caught.value)
    assert "'org/name'" in message and words in message and "\n" not in message


# Random parameters


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
    embedding = np.asarray(
        random_params(ModelConfig("llama", 9000, 128, 8, 1, 2, 1, 4), 1, jnp.float32).embedding[...]
    )
    assert embedding.size > 1_000_003
    assert len(np.unique(embedding, axis=0)) == len(embedding)
    assert (first.blocks[0].ffw.down[...] != first.blocks[1].ffw.down[...]).any()


# Orbax


@pytest.fixture
def orbax(tmp_path) -> pathlib.Path:
    save_orbax(randomised(CONFIG, jnp.bfloat16), CONFIG, tmp_path / "orbax")
    return tmp_path / "orbax"


def orbax_refusal(directory, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_orbax(directory)
    assert all(word in str(caught.value) for word in words), caught.value


def test_orbax_saving_and_loading_is_the_identity(orbax):
    params, config = load_orbax(orbax)
    assert config == CONFIG
    assert_equal(params, randomised(CONFIG, jnp.bfloat16))
    assert [path.name for path in orbax.parent.iterdir()] == ["orbax"]


def test_orbax_parameters_are_cast_and_placed(orbax):
    mesh = jax.make_mesh((1,), ("kv_heads",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, _ = load_orbax(orbax, jnp.float32, whole)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), randomised(CONFIG, jnp.bfloat16))
    assert_equal(params, expected)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {whole}


def test_orbax_overwrites_nothing(orbax):
    with pytest.raises(ValueError, match="exists already"):
        save_orbax(randomised(CONFIG), CONFIG, orbax)
    load_orbax(orbax)


def test_orbax_refuses_parameters_of_another_config(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        save_orbax(randomised(CONFIG), TIED, tmp_path / "orbax")
    assert not list(tmp_path.iterdir())


def test_orbax_names_what_is_missing_or_damaged(orbax, tmp_path):
    orbax_refusal(tmp_path / "absent", "absent", "save_orbax")
    written = (orbax / "model_config.json").read_text()
    (orbax / "model_config.json").write_text(written.replace('"ffw_dim": 24', '"ffw_dim": 32'))
    orbax_refusal(orbax, "blocks.0.ffw.down", "(24, 16)", "(32, 16)")
    (orbax / "model_config.json").write_text(written.replace('"ffw_dim"', '"fww_dim"'))
    orbax_refusal(orbax, "model_config.json", "fww_dim")
    (orbax / "model_config.json").write_text("[")
    orbax_refusal(orbax, "model_config.json")
    (orbax / "model_config.json").write_text(written)
    for file in (orbax / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    orbax_refusal(orbax, str(orbax / "params"))
