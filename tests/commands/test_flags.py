"""Flags: every field of a request and of an engine has one, and the help is readable."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from absl import flags

from jaxserve import EngineConfig, SamplingParams
from jaxserve.commands.flags import GROUPS, engine_options, parse_flags, sampling_params
from jaxserve.commands.options import define_flags, help_text, parse_options
from jaxserve.request import default_text, parameters_of
from tests.command_line import parse

# Field -> arguments, and the value that they set.
PARAMETERS: dict[str, tuple[str, Any]] = {
    "allowed_token_ids": ("--allowed_token_ids=1,2 --allowed_token_ids=7", (1, 2, 7)),
    "bad_words": ("--bad_words=no --bad_words=a,b", ("no", "a,b")),
    "min_tokens": ("--min_tokens=3", 3),
    "logit_bias": ("--logit_bias=5:-1.5,7:2 --logit_bias=1:100", ((1, 100.0), (5, -1.5), (7, 2.0))),
    "repetition_penalty": ("--repetition_penalty=1.5", 1.5),
    "frequency_penalty": ("--frequency_penalty=-2", -2.0),
    "presence_penalty": ("--presence_penalty=0.5", 0.5),
    "temperature": ("--temperature=0.7", 0.7),
    "min_p": ("--min_p=0.1", 0.1),
    "top_k": ("--top_k=40", 40),
    "top_p": ("--top_p=0.9", 0.9),
    "seed": ("--seed=18446744073709551615", 2**64 - 1),
    "n": ("--n=2", 2),
    "ignore_eos": ("--ignore_eos", True),
    "stop_token_ids": ("--stop_token_ids=3 --stop_token_ids=1,2", (3, 1, 2)),
    "stop": ("--stop=END --stop=,", ("END", ",")),
    "include_stop_str_in_output": ("--include_stop_str_in_output", True),
    "max_tokens": ("--max_tokens=99", 99),
    "logprobs": ("--logprobs=0", 0),
    "logprobs_mode": ("--logprobs_mode=processed", "processed"),
    "prompt_logprobs": ("--prompt_logprobs=2", 2),
    "detokenize": ("--nodetokenize", False),
    "skip_special_tokens": ("--noskip_special_tokens", False),
    "spaces_between_special_tokens": ("--nospaces_between_special_tokens", False),
    "truncate_prompt_tokens": ("--truncate_prompt_tokens=-1", -1),
}
CAPACITIES = {"num_pages": 4096, "max_queue": 256, "tile_rows": 16, "kv_dtype": "float16", "attention_backend": "tpu"}
CAPACITIES |= {"weight_dtype": "int8", "max_model_len": 512}


def test_every_field_of_sampling_params_has_a_flag_that_sets_it_and_nothing_else() -> None:
    assert PARAMETERS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, (arguments, value) in PARAMETERS.items():
        values = parse(*arguments.split())
        assert sampling_params(values) == SamplingParams(**{name: value}) != SamplingParams(), name


@pytest.mark.parametrize("record", [SamplingParams, EngineConfig])
def test_a_flag_stands_in_the_group_of_its_field_with_its_meaning_and_default(record: type) -> None:
    values = parse()
    by_group = values.flags_by_module_dict()
    for name, item in parameters_of(record).items():
        assert item.group in GROUPS and values[name] in by_group[item.group], name
        default = {"max_tokens": "128, in a chat 1024", "max_waiting": "no bound"}.get(name, item.default)
        text = values[name].help.partition(";\n")[0]  # absl writes more about a list
        assert text.endswith(item.description + default_text(default)) and not item.description[0].islower(), name


def test_every_field_of_the_engine_config_has_a_flag_that_sets_it_and_nothing_else() -> None:
    for field in dataclasses.fields(EngineConfig):
        default: Any = field.default
        value = CAPACITIES.get(field.name, default)
        if value == default:
            value = not default if isinstance(default, bool) else default * 2
        config = engine_options(parse(f"--{field.name}={value}")).config
        assert config == EngineConfig(**{field.name: value}) != EngineConfig(), field.name


def test_without_flags_the_defaults_of_the_records_hold() -> None:
    assert sampling_params(parse()) == SamplingParams()
    assert sampling_params(parse(), max_tokens=128) == SamplingParams(max_tokens=128)
    assert engine_options(parse()).config == EngineConfig()
    assert engine_options(parse(), max_waiting=None).config == EngineConfig(max_waiting=None)


def test_flags_override_the_engine_config_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"max_slots": 3, "page_size": 8, "deterministic": False}))
    config = engine_options(parse(f"--config={file}", "--page_size=32", "--deterministic")).config
    assert config == EngineConfig(max_slots=3, page_size=32, deterministic=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop_token_ids=1,x"], "--stop_token_ids: 'x' must be a token id"),
        (["--allowed_token_ids="], "--allowed_token_ids: '' must be a token id"),
        (["--stop_token_ids=-1"], "stop_token_ids[0]=-1"),
        (["--logit_bias=5"], "--logit_bias: '5' must be a token id and a number"),
        (["--logit_bias=5:nan"], "logit_bias[5]=nan"),
        (["--logit_bias=5:1,5:2"], "token id 5 twice"),
        (["--top_p=2"], "top_p=2.0"),
        (["--temperature=inf"], "temperature=inf"),
        (["--seed=-1"], "seed=-1"),
        (["--stop="], "must not be empty"),
        (["--min_tokens=200"], "min_tokens=200 must be at most max_tokens=128"),
        (["--engine_seed=-1"], "--engine_seed=-1"),
        (["--num_pages=3"], "num_pages=3"),
        (["--max_queue=2"], "max_queue=2 must be at least max_slots=32"),
        (["--config=/nonexistent.json"], "/nonexistent.json"),
        (["--logprobs=2"], "--logprobs is reported in JSON lines only"),
        (["--system=x"], "--system is the system message of a chat: add --chat"),
        (["--stream", "--output=x"], "use one of them"),
    ],
)
def test_a_value_that_is_not_valid_is_refused_in_a_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_options(parse("--prompt=x", *arguments), in_terminal=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "in_terminal", "message"),
    [
        ([], True, "nothing to do"),
        (["--chat"], True, "nothing to do"),
        (["--stream"], True, "nothing to do"),
        (["--chat", "--stream"], False, "nothing to do"),
        (["--chat", "--stream", "--nodetokenize"], True, "the text of one answer"),
    ],
)
def test_without_a_prompt_there_must_be_someone_to_talk_to(
    arguments: list[str], in_terminal: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(parse(*arguments), in_terminal=in_terminal)
    assert parse_options(parse("--chat", "--stream"), in_terminal=True).interactive


def test_a_chat_has_a_longer_default_than_other_text() -> None:
    chat = parse_options(parse("--chat", "--prompt=x"), in_terminal=False)
    plain = parse_options(parse("--prompt=x"), in_terminal=False)
    assert (chat.params.max_tokens, plain.params.max_tokens) == (1024, 128)


def test_all_prompts_may_wait_unless_a_flag_says_otherwise() -> None:
    def max_waiting(*arguments: str) -> int | None:
        return parse_options(parse("--prompt=x", *arguments), in_terminal=False).engine.config.max_waiting

    assert (max_waiting(), max_waiting("--max_waiting=7")) == (None, 7)


def test_the_help_has_every_flag_once_in_its_group_with_its_default() -> None:
    values = parse()
    text = help_text(values)
    assert max(map(len, text.splitlines())) <= 100
    assert "repeat this option" not in text and "\u00a0" not in text and "<" not in text
    names = [field.name for record in (SamplingParams, EngineConfig) for field in dataclasses.fields(record)]
    for name in {*names, *values} - {"help"}:
        lines = [line for line in text.splitlines() if line.startswith((f"  --{name}=", f"  --[no]{name}"))]
        assert len([line for line in lines if line.split()[0].partition("=")[0].endswith(name)]) == 1, name
    groups = [line for line in text.splitlines() if line in GROUPS]
    assert groups == [
        *("Prompts and output", "Model", "What changes the logits", "How a token is drawn", "When it stops"),
        *("What is reported", "Engine"),
    ]
    assert "(default: 128, in a chat 1024)" in text and "Sequences that run at the same time. (default: 32)" in text


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["-?"], ["--chat", "--help"], ["--helpshort"]])
def test_help_goes_to_stdout_with_status_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    values = flags.FlagValues()
    define_flags(values)
    with pytest.raises(SystemExit) as end:
        parse_flags(["command", *arguments], values, lambda: "the help")
    assert end.value.code == 0 and capsys.readouterr().out == "the help\n"


def test_a_flag_that_does_not_exist_gets_a_sentence_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    values = flags.FlagValues()
    define_flags(values)
    with pytest.raises(SystemExit) as end:
        parse_flags(["command", "--temprature=1"], values, lambda: "")
    output = capsys.readouterr()
    assert end.value.code == 1 and output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("error: ") and "temperature" in output.err and "--help" in output.err


def test_a_prompt_may_look_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    values = flags.FlagValues()
    define_flags(values)
    parse_flags(["command", "--prompt", "--help"], values, lambda: "")
    assert values.prompt == ["--help"] and capsys.readouterr().out == ""
