"""The meaning of config.json for each family, and its refusals."""

import json
import pathlib

import pytest
import transformers

from jaxserve.models import ModelConfig, RopeConfig
from jaxserve.models.families.hugging_face import FAMILIES, from_hugging_face, read_model_config, to_hugging_face

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mapping(model_type: str = "llama", **changes) -> dict:
    return {"model_type": model_type, **SIZES, **changes}


def refusal(mapping: dict, **options) -> str:
    with pytest.raises(ValueError) as caught:
        from_hugging_face(mapping, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sizes_are_read():
    config = from_hugging_face(mapping(rms_norm_eps=1e-5, max_position_embeddings=512, head_dim=20))
    assert config == ModelConfig(
        "llama", 100, 48, 64, 3, num_heads=4, num_kv_heads=2, head_dim=20, norm_eps=1e-5, max_position=512
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(family):
    sizes = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"} | {"num_attention_heads": 64}
    sizes["hidden_size"] = 128
    theirs = transformers.AutoConfig.for_model(family, **sizes)
    config = from_hugging_face({"model_type": family, **sizes})
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert (config.num_kv_heads, config.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (config.norm_eps, config.max_position) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert set(config.windows) == {theirs.sliding_window if family == "mistral" else None}


@pytest.mark.parametrize(
    ("family", "fields", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases_follow_the_family(family, fields, biases):
    config = from_hugging_face(mapping(family, **fields))
    assert (config.qkv_bias, config.out_bias, config.ffw_bias) == biases
    assert config.qk_norm == (family == "qwen3")


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("llama", {"sliding_window": None, "layer_types": [F, F, F]}, (None, None, None)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": 8, "layer_types": [S, S, S]}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("qwen2", {"sliding_window": 8}, (None, None, None)),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
            (None, None, None),
        ),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, (None, None, None)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8)),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, (8, 8, 8)),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": [S, F, S]}, (8, None, 8)),
        (
            "qwen3",
            {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
            (None, None, None),
        ),
    ],
)
def test_windows_follow_the_family(family, fields, windows):
    assert from_hugging_face(mapping(family, **fields)).windows == windows


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000, "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        },
    ],
)
def test_both_forms_of_rotary_settings_are_read(fields):
    assert from_hugging_face(mapping(**fields)).rope == RopeConfig(5e5, "linear", 2.0)


def test_the_length_before_stretching_defaults_to_the_longest_context():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert from_hugging_face(mapping(rope_scaling=yarn, max_position_embeddings=64)).rope.original_max_position == 64
    fields = {"rope_scaling": yarn, "original_max_position_embeddings": 32}
    assert from_hugging_face(mapping(**fields)).rope.original_max_position == 32


def test_a_yarn_factor_of_null_is_the_ratio_of_the_lengths():
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    assert from_hugging_face(mapping(rope_scaling=yarn, max_position_embeddings=128)).rope.factor == 4.0


def test_a_checkpoints_irrelevant_keys_are_ignored():
    extras = {
        "transformers.js_config": {},
        "is_llama_config": True,
        "rope_interleaved": False,
        "eos_token_id": [1, 2],
    }
    extras |= {
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
        "auto_map": {"AutoModel": "modeling_x.X"},
    }
    assert from_hugging_face(mapping(**extras)) == from_hugging_face(mapping())


def test_strict_reading_names_an_unknown_key_and_the_likely_one():
    message = refusal(mapping(num_hidden_layer=2), strict=True)
    assert "num_hidden_layer'" in message and "'num_hidden_layers'" in message
    assert "'zzz'" in refusal(mapping(zzz=1), strict=True)
    assert from_hugging_face(mapping(torch_dtype="bfloat16", eos_token_id=3), strict=True)


DYNAMIC = {"type": "dynamic", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type is missing"]),
        ({"model_type": ["llama"]}, ["model_type=['llama']", "a string"]),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ["LlamaForSequenceClassification", "LlamaForCausalLM"],
        ),
        ({"architectures": ["LlamaModel", "x"]}, ["LlamaModel"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"rope_interleaved": True}, ["rope_interleaved=True"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0"]),
        ({"num_local_experts": 8}, ["num_local_experts=8"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"vocab_size": "100"}, ["vocab_size='100'", "integer"]),
        ({"vocab_size": True}, ["vocab_size=True"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers=2.0"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps='1e-5'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'", "true or false"]),
        ({"num_attention_heads": 5, "head_dim": 8}, ["num_heads=5", "num_kv_heads=2"]),
        ({"num_attention_heads": 10}, ["hidden_size=48", "num_attention_heads=10", "head_dim"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"sliding_window": 8}, ["sliding_window=8", "'llama'"]),
        ({"layer_types": [S, S, S]}, ["layer_types", "'llama'"]),
        ({"layer_types": [F]}, ["layer_types has 1", "num_hidden_layers=3"]),
        ({"layer_types": ["chunked_attention"] * 3}, ["chunked_attention"]),
        ({"model_type": "mistral", "attention_bias": True}, ["attention_bias=True", "'mistral'"]),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": [S, F, S]},
            ["layer_types", "'mistral'"],
        ),
        (
            {"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False},
            ["use_sliding_window=False"],
        ),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window=0"]),
        ({"model_type": "qwen2", "attention_bias": False}, ["attention_bias=False", "'qwen2'"]),
        ({"model_type": "qwen2", "mlp_bias": True}, ["mlp_bias=True", "'qwen2'"]),
        ({"model_type": "qwen2", "layer_types": [S, F, F]}, ["layer_types", "use_sliding_window"]),
        ({"rope_scaling": DYNAMIC}, ["'dynamic'", "stale", "yarn"]),
        ({"rope_parameters": LONGROPE}, ["'longrope'", "stale"]),
        ({"rope_scaling": {"type": "mrope"}}, ["'mrope'", "default, linear, llama3, yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor='2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, ["'linear'", "'beta_fast'"]),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            ["rope_type", "'linear'", "'yarn'"],
        ),
        ({"rope_scaling": LLAMA3}, ["low_freq_factor=4.0", "high_freq_factor=4.0"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["'llama3'", "low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, ["truncate=1"]),
        ({"rope_scaling": [1]}, ["rope_scaling=[1]", "object"]),
        ({"rope_parameters": {S: {"rope_theta": 1e4}}}, ["per layer type"]),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=0.5"],
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "1000000.0", "10000.0"]),
        ({"rope_theta": -1}, ["rope_theta=-1"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, words):
    message = refusal(mapping() | fields)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("file", sorted(pathlib.Path("configs/models").glob("*.json")), ids=lambda file: file.name)
def test_our_own_model_files_are_read_strictly_and_written_back(file):
    config = read_model_config(file, strict=True)
    assert from_hugging_face(to_hugging_face(config), strict=True) == config


def test_the_zoo_survives_writing_and_reading(reference):
    config = read_model_config(reference.directory)
    written = to_hugging_face(config)
    assert from_hugging_face(written, strict=True) == config
    theirs = transformers.AutoConfig.for_model(**written)
    for key in (
        "layer_types",
        "sliding_window",
        "head_dim",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    ):
        assert getattr(theirs, key, None) == getattr(reference.model.config, key, None)
    rope = reference.model.config.rope_parameters
    assert {key: theirs.rope_parameters[key] for key in rope} == rope


def test_a_model_that_no_checkpoint_can_express_is_refused():
    with pytest.raises(ValueError, match="cannot express"):
        to_hugging_face(ModelConfig("llama", 100, 48, 64, 2, 4, 2, 12, qk_norm=True))
    with pytest.raises(ValueError, match="'gpt2'"):
        to_hugging_face(ModelConfig("gpt2", 100, 48, 64, 2, 4, 2, 12))


def file_refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_model_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_or_its_directory_can_be_given(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(mapping()))
    assert (
        read_model_config(tmp_path) == read_model_config(str(tmp_path / "config.json")) == from_hugging_face(mapping())
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "JSON list"),
        (b'{"model_type": "gpt2"}', "'gpt2' is not supported"),
    ],
)
def test_a_bad_file_is_named(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert words in file_refusal(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    assert "does not exist" in file_refusal(tmp_path)
    assert "does not exist" in file_refusal(tmp_path / "absent.json")
