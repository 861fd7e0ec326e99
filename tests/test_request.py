"""Sampling parameters and requests: the values that are accepted, and the refusal of all others."""

import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.request import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    parameters_of,
)


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.n, params.seed) == (16, 0, 1, None)
    assert params.logprobs is None and params.detokenize and params.skip_special_tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_k", 2**31 - 1),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("min_p", 0),
        ("min_p", 1),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("seed", None),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", None),
        ("stop_token_ids", ()),
        ("ignore_eos", True),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("max_tokens", True),
        ("logprobs", -1),
        ("logprobs", False),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.5]),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("skip_special_tokens", "yes"),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_value(name, value):
    shown = f"{name}=" if name != "stop_token_ids" else name
    with pytest.raises(ValueError, match=shown) as caught:
        SamplingParams(**{name: value})
    assert "must be" in str(caught.value) and "\n" not in str(caught.value)


CHANGED = {
    "logit_bias": {1: 1.0},
    "stop_token_ids": [1],
    "allowed_token_ids": [1],
    "logprobs_mode": "processed",
    "truncate_prompt_tokens": 3,
    "seed": 1,
    "logprobs": 1,
}


@pytest.mark.parametrize("record", [SamplingParams, EngineConfig])
def test_every_field_has_a_meaning_a_group_and_a_rule_that_accepts_the_default_and_refuses_nonsense(record):
    for name, item in parameters_of(record).items():
        assert item.meaning.endswith(".") and item.group, name
        assert item.rule(name, item.default) == getattr(record(), name) == item.default, name
        with pytest.raises(ValueError, match=f"^{name}=.* must be ") as caught:
            record(**{name: object()})
        assert "\n" not in str(caught.value), name
        assert f"  {name}: " in record.__doc__, name


def test_a_field_without_a_declaration_is_noticed():
    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 3

    with pytest.raises(TypeError):
        parameters_of(Options)


def test_parameters_are_given_by_name():
    with pytest.raises(TypeError):
        SamplingParams(0.5)


def test_every_parameter_is_kept():
    for field in dataclasses.fields(SamplingParams):
        value = CHANGED.get(field.name)
        if value is None:
            default = field.default
            value = not default if isinstance(default, bool) else ["a"] if default == () else (default or 0) + 1
            value = 0.5 if field.name in ("top_p", "min_p") else value
        assert SamplingParams(**{field.name: value}) != SamplingParams(), field.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs_mode": "both"}, "logprobs_mode='both' must be one of raw, processed"),
        ({"n": 0}, "n=0 must be an integer from 1"),
        ({"n": True}, "n=True must be an integer"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0.0 would give the same sample 2 times"),
        ({"min_tokens": 20}, "min_tokens=20 must be at most max_tokens=16"),
        ({"stop": ["x"], "detokenize": False}, "stop=.* needs text: leave detokenize on"),
        ({"allowed_token_ids": []}, "allowed_token_ids=.* leaves no token to draw"),
        ({"logit_bias": {3: math.inf}}, r"logit_bias\[3\]=inf must be a number"),
        ({"logit_bias": {"x": 1}}, "logit_bias key='x' must be an integer"),
        ({"logit_bias": {1: 1, "1": 2}}, "logit_bias has token id 1 twice"),
        ({"logit_bias": [1]}, "must be a mapping from token ids to numbers"),
        ({"bad_words": [""]}, r"bad_words\[0\]='' must not be empty"),
        ({"bad_words": {"a": 1}}, "bad_words=.* must be a list of strings"),
        ({"stop": [[]]}, r"stop\[0\]=\[\] must not be empty"),
        ({"stop": [3]}, r"stop\[0\]=3 must be a list of token ids"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be a number in"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan must be a number in"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a number in"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be a number in"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 must be an integer from 1 to 2147483647, or -1"),
        ({"top_k": -2}, "top_k=-2 must be an integer from 0 to 2147483647, or -1"),
    ],
)
def test_what_contradicts_or_means_nothing_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**fields)
    assert "\n" not in str(caught.value)


def test_a_bias_is_clamped_and_its_keys_may_be_digits_as_in_json():
    assert SamplingParams(logit_bias={"7": -1000, 3: 0.5}).logit_bias == ((3, 0.5), (7, -100.0))
    again = SamplingParams(logit_bias={3: 0.5})
    assert dataclasses.replace(again, top_k=2).logit_bias == again.logit_bias


def test_texts_and_token_lists_to_stop_at_are_told_apart():
    params = SamplingParams(stop=["END", [5, np.int32(6)], "\n"])
    assert params.stop_strings == ("END", "\n") and params.stop_sequences == ((5, 6),)
    assert SamplingParams(stop="END").stop_strings == ("END",)


def test_empty_lists_and_whole_numbers_count_as_defaults():
    params = SamplingParams(stop=[], bad_words=[], logit_bias={}, presence_penalty=0, repetition_penalty=1)
    assert params == SamplingParams()


def test_parameters_are_hashable_and_normalised():
    params = SamplingParams(top_k=-1, stop_token_ids=[3, np.int32(4)], seed=np.uint64(7), temperature=np.float32(0.5))
    assert params == SamplingParams(stop_token_ids=(3, 4), seed=7, temperature=0.5)
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))
    assert type(params.seed) is int and type(params.temperature) is float


def test_greedy_is_below_the_documented_temperature():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_unknown_names_are_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="unknown sampling parameter 'temprature': did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(ValueError, match="unknown sampling parameter 'xyzzy': known are .*top_k"):
        SamplingParams.from_dict({"xyzzy": 1})


def test_override_changes_only_the_given_fields():
    params = SamplingParams(temperature=0.5, max_tokens=3).override({"max_tokens": 4})
    assert (params.temperature, params.max_tokens) == (0.5, 4)
    assert SamplingParams.from_dict({"max_tokens": 4}) == SamplingParams(max_tokens=4)


def test_request_takes_text_or_tokens():
    assert Request("a", "text").prompt_token_ids is None
    assert Request("a", prompt_token_ids=[1, 2]).prompt_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "", "prompt": "x"}, "id=''"),
        ({"id": 3, "prompt": "x"}, "id=3"),
        ({"id": "a"}, "has no prompt"),
        ({"id": "a", "prompt": b"x"}, "prompt=b'x'"),
        ({"id": "a", "prompt": "x\ud83d"}, "surrogate pair at character 1"),
        ({"id": "a", "prompt_token_ids": []}, "at least one token"),
        ({"id": "a", "prompt_token_ids": [-1]}, r"prompt_token_ids\[0\]=-1"),
        ({"id": "a", "prompt_token_ids": [2**31]}, r"prompt_token_ids\[0\]"),
        ({"id": "a", "prompt": "x", "priority": 0.5}, "priority=0.5"),
        ({"id": "a", "prompt": "x", "params": {}}, "params={}"),
    ],
)
def test_requests_that_are_not_valid_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_output_is_finished_when_all_samples_are_or_it_failed():
    done, running = CompletionOutput(0, "x", (1,), "stop"), CompletionOutput(1, "", ())
    metrics = RequestMetrics(arrival_time=0.0)
    assert RequestOutput("a", "p", (1,), (done,), metrics).finished
    assert not RequestOutput("a", "p", (1,), (done, running), metrics).finished
    assert RequestOutput("a", "p", (), (), error="too long").finished


@pytest.mark.parametrize("module", ["request", "config", "commands.prompts", "text.tokenizer"])
def test_import_loads_no_heavy_module(module):
    heavy = ("jax", "transformers", "tokenizers", "orbax", "torch", "absl.flags")
    code = f"import sys, jaxserve.{module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The package itself may import jax; these modules must not.
    package = subprocess.run([sys.executable, "-c", code.replace(f".{module}", "")], capture_output=True, text=True)
    assert set(done.stdout.split()) <= set(package.stdout.split())
