"""Orbax checkpoints."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxserve.models.checkpoint.hugging_face import CheckpointError
from jaxserve.models.checkpoint.orbax import load_orbax, save_orbax
from tests.models.tiny import CONFIG, TIED, assert_equal, randomised


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


def test_orbax_values_too_large_for_float16_are_named(tmp_path):
    save_orbax(jax.tree.map(lambda leaf: leaf * 1e6, randomised(CONFIG)), CONFIG, tmp_path / "orbax")
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        load_orbax(tmp_path / "orbax", jnp.float16)


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
    (orbax / "params" / "_METADATA").write_text("{")
    orbax_refusal(orbax, str(orbax / "params"))
