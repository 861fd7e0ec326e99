"""The engine's configuration: derived sizes, refusals, presets."""

import json
import pathlib

import pytest

from jaxserve.config import EngineConfig
from jaxserve.models.families.hugging_face import read_model_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def test_derived_sizes_round_up():
    config = EngineConfig(max_slots=5, page_size=16, max_model_len=33, chunk_size=12, tile_rows=8)
    assert (config.pages_per_slot, config.queue_size, config.max_batch_size) == (3, 20, 24)
    assert EngineConfig(max_slots=4, max_queue=7).queue_size == 7


def test_deterministic_engine_has_one_tile_size():
    assert EngineConfig(tile_rows=32).tile_sizes == (32,)
    assert EngineConfig(tile_rows=32, deterministic=False).tile_sizes == (128, 32)
    narrow = EngineConfig(max_slots=2, chunk_size=8, tile_rows=8, deterministic=False)
    assert narrow.tile_sizes == (8,), "no tile is wider than a step"


def test_a_tile_holds_all_slots_where_a_tile_costs_one_read_of_the_weights():
    assert EngineConfig(max_slots=100, attention_backend="reference").tile_size == 32
    assert EngineConfig(max_slots=100, attention_backend="triton").tile_size == 112
    assert EngineConfig(max_slots=100, attention_backend="triton", tile_rows=8).tile_size == 8


def test_config_is_hashable_by_value():
    assert hash(EngineConfig(page_size=32)) == hash(EngineConfig(page_size=32))
    assert EngineConfig(page_size=32) != EngineConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_slots": 0}, "max_slots=0 must be an integer from 1 to"),
        ({"max_slots": 1.0}, "max_slots=1.0"),
        ({"max_slots": True}, "max_slots=True"),
        ({"max_slots": None}, "max_slots=None"),
        ({"page_size": 12}, "page_size=12 must be one of"),
        ({"page_size": 4}, "page_size=4"),
        ({"page_size": 512}, "page_size=512"),
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"max_logprobs": -1}, "max_logprobs=-1"),
        ({"max_stop_token_ids": 0}, "max_stop_token_ids=0"),
        ({"tile_rows": 0}, "tile_rows=0"),
        ({"attention_backend": "cuda"}, "attention_backend='cuda' must be one of reference, native, triton"),
        ({"interpret_kernels": 1}, "interpret_kernels=1 must be true or false"),
        ({"max_steps_per_call": "8"}, "max_steps_per_call='8'"),
        ({"max_model_len": 2**31}, "max_model_len="),
        ({"deterministic": 1}, "deterministic=1"),
        ({"debug_checks": "no"}, "debug_checks='no'"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8' must be one of"),
        ({"weight_dtype": "bfloat16"}, "weight_dtype='bfloat16' must be one of int8, or null"),
        ({"num_pages": 127, "max_model_len": 2048}, "num_pages=127 cannot hold .* at least 128 pages"),
    ],
)
def test_values_that_are_not_valid_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_backend": "reference"},
        {"attention_backend": "triton"},
        {"attention_backend": None, "kv_dtype": "float16"},  # is left to "reference"
    ],
)
def test_int8_weights_are_refused_where_the_backend_is_not_native(fields):
    config = EngineConfig(weight_dtype="int8", **fields)
    with pytest.raises(
        ValueError, match="weight_dtype='int8' needs the backend 'native', but .* leave weight_dtype out"
    ):
        _ = config.backend


def test_pool_of_one_longest_sequence_is_taken():
    assert EngineConfig(num_pages=128, max_model_len=2048).num_pages == 128


def test_json_keys_that_are_unknown_are_refused_with_file_and_nearest(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text('{"max_slot": 4}')
    with pytest.raises(ValueError, match=r"engine\.json: unknown engine option 'max_slot': did you mean 'max_slots'"):
        EngineConfig.from_json(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"max_slots": -1}', "\xff"])
def test_json_that_is_not_valid_is_refused_with_the_file(tmp_path, text):
    path = tmp_path / "engine.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"engine\.json"):
        EngineConfig.from_json(path)


def test_missing_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        EngineConfig.from_json(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted((CONFIGS / "engine").glob("*.json")), ids=lambda path: path.stem)
def test_engine_presets_load(path):
    assert EngineConfig.from_json(path) == EngineConfig(**json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("name", "num_millions"),
    [
        ("llama-135m", 135),
        ("llama3-8b", 8030),
        ("llama3.2-1b", 1236),
        ("qwen3-0.6b", 596),
        ("qwen2.5-0.5b", 494),
        ("mistral-7b", 7242),
    ],
)
def test_model_shapes_have_the_published_number_of_parameters(name, num_millions):
    model = read_model_config(CONFIGS / "models" / f"{name}.json")
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    biases = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.qkv_bias else 0
    norms = 2 * model.embed_dim + (2 * model.head_dim if model.qk_norm else 0)
    layer = model.embed_dim * (heads + 3 * model.ffw_dim) + biases + norms
    embeddings = model.vocab_size * model.embed_dim * (1 if model.tied_embeddings else 2)
    num_parameters = model.num_layers * layer + embeddings + model.embed_dim
    assert round(num_parameters / 1e6) == num_millions


def test_every_model_shape_is_tested():
    assert len(list((CONFIGS / "models").glob("*.json"))) == 6


def test_a_file_with_a_key_twice_or_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text('{"max_slots": 4, "max_slots": 5}')
    with pytest.raises(ValueError, match="'max_slots' is there twice"):
        EngineConfig.from_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        EngineConfig.from_json(path)
