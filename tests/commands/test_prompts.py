"""Files of prompts: one bad line loses no other, and no two lines have the same id."""

import json

import pytest

from jaxserve.commands.prompts import ChatRequest, PromptError, read_prompts
from jaxserve.request import Request, SamplingParams

BASE = SamplingParams(temperature=0.5, max_tokens=9)


def _read(tmp_path, content: str | bytes, name: str = "prompts.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_prompts(path, BASE))


def test_text_lines_are_prompts_as_they_are(tmp_path):
    requests = _read(tmp_path, "one\n\n  two \r\nthr\u2028ee", "prompts.txt")
    assert [request.prompt for request in requests] == ["one", "  two ", "thr\u2028ee"]
    assert [request.id for request in requests] == ["line-1", "line-3", "line-4"]
    assert all(request.params == BASE for request in requests)


def test_json_line_overrides_the_defaults(tmp_path):
    line = {"prompt": "hi", "id": "a", "priority": -3, "temperature": 0, "logprobs": 2}
    (request,) = _read(tmp_path, json.dumps(line))
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=2)
    assert request == Request("a", "hi", params=params, priority=-3)


def test_json_line_may_give_tokens(tmp_path):
    (request,) = _read(tmp_path, '\ufeff{"prompt_token_ids": [1, 2]}\n\n')
    assert request == Request("line-1", prompt_token_ids=(1, 2), params=BASE)


def test_json_line_may_set_every_sampling_parameter(tmp_path):
    fields = {
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 5,
        "n": 2,
        "max_tokens": 7,
        "min_tokens": 2,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "logprobs": 1,
        "logprobs_mode": "processed",
        "prompt_logprobs": 0,
        "detokenize": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 2,
        "logit_bias": {"5": -3, "7": 1.5},
        "allowed_token_ids": [5, 6],
        "bad_words": ["no", [1, 2]],
        "stop": ["END", [3, 4]],
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": -1,
    }
    assert fields.keys() == SamplingParams.__dataclass_fields__.keys()
    (request,) = _read(tmp_path, json.dumps({"prompt": "hi", **fields}))
    assert request == Request("line-1", "hi", params=SamplingParams.from_dict(fields))
    assert request.params.stop == ("END", (3, 4)) and request.params.logit_bias == ((5, -3.0), (7, 1.5))


def test_json_line_may_be_a_conversation(tmp_path):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "so"},
    ]
    (chat,) = _read(tmp_path, json.dumps({"messages": messages, "id": "c", "priority": 2, "top_k": 4}))
    params = SamplingParams(temperature=0.5, max_tokens=9, top_k=4)
    assert chat == ChatRequest(Request("c", "so", params=params, priority=2), tuple(messages))
    led = chat.with_system("be brief")
    assert led.messages == ({"role": "system", "content": "be brief"}, *messages)
    assert led.with_system("be long") == led
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        chat.render(None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "not valid JSON at column 1"),
        ('{"prompt": "x"', "not valid JSON at column 15"),
        ('"hello"', "not a JSON object"),
        ("{}", "either prompt or prompt_token_ids"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "either prompt or prompt_token_ids"),
        ('{"prompt": "x", "messages": []}', "either prompt or prompt_token_ids or messages"),
        ('{"messages": []}', "messages=[] must be a list of at least one message"),
        ('{"messages": {"role": "user", "content": "x"}}', "must be a list"),
        ('{"messages": ["x"]}', "messages[0]='x' must be like"),
        ('{"messages": [{"role": "user"}]}', "messages[0]="),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0]="),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "messages[0]="),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "messages[0]="),
        ('{"prompt": null}', "no prompt"),
        ('{"prompt": 3}', "prompt=3 must be a string"),
        (r'{"prompt": "\ud800"}', "surrogate"),
        ('{"prompt": "x", "temprature": 1}', "unknown field 'temprature': did you mean 'temperature'"),
        ('{"prompt": "x", "temperature": 3}', "temperature=3 must be"),
        ('{"prompt": "x", "temperature": NaN}', "NaN is not valid JSON"),
        ('{"prompt": "x", "temperature": 1e999}', "temperature=inf"),
        ('{"prompt": "x", "n": 0}', "n=0 must be an integer from 1"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' is there twice"),
        ('{"prompt": "x", "id": 3}', "id=3"),
        ('{"prompt": "x", "params": {}}', "unknown field 'params'"),
        ('{"prompt_token_ids": "12"}', "list of token ids"),
        ('{"prompt_token_ids": [1e3]}', "prompt_token_ids"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "limit"),
    ],
)
def test_bad_line_names_file_and_line_and_loses_no_other(tmp_path, line, message):
    before, error, after = _read(tmp_path, f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    assert (before.prompt, after.prompt) == ("a", "b")
    assert isinstance(error, PromptError)
    assert error.message.startswith(f"{tmp_path}/prompts.jsonl:2: ") and message in error.message
    assert "\n" not in error.message


def test_bad_line_keeps_its_id(tmp_path):
    (error,) = _read(tmp_path, '{"prompt": "x", "id": "mine", "top_p": 0}')
    assert error.id == "mine"


def test_invalid_utf8_is_an_error_of_its_line(tmp_path):
    first, second = _read(tmp_path, b"ab\xff\nfine\n", "prompts.txt")
    assert "prompts.txt:1: byte 3 is not valid UTF-8" in first.message
    assert second.prompt == "fine"


def test_ids_must_differ(tmp_path):
    _, error = _read(tmp_path, '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}')
    assert "id='a' was used in line 1" in error.message


@pytest.mark.parametrize(
    ("lines", "entries"),
    [
        (['{"id": "line-2", "prompt": "x"}', "{oops", '{"prompt": "y"}'], "line-2 error:line-2-2 line-3"),
        (['{"prompt": "x"}', '{"prompt": "y", "id": "line-1"}'], "line-1-2 line-1"),
        (["{oops", '{"prompt": "x", "id": "line-1"}'], "error:line-1-2 line-1"),
        (
            ['{"prompt": "x"}', '{"prompt": "y", "id": "line-1-2"}', '{"id": "line-1"}'],
            "line-1-3 line-1-2 error:line-1",
        ),
        (['{"prompt": "x", "id": "a"}', '{"prompt": "y", "id": "a"}', '{"id": "a"}'], "a error:line-2 error:line-3"),
        (['{"id": "a"}', '{"prompt": "y", "id": "a"}'], "error:line-1 a"),
        (['{"id": "a"}', '{"id": "a"}'], "error:a error:line-2"),
    ],
)
def test_no_two_lines_have_the_same_id_and_an_id_of_its_own_goes_to_a_valid_line_first(tmp_path, lines, entries):
    read = _read(tmp_path, "\n".join(lines))
    assert " ".join(f"{'error:' * isinstance(entry, PromptError)}{entry.id}" for entry in read) == entries


def test_json_lines_in_a_text_file_are_not_taken_for_prompts(tmp_path):
    error, request = _read(tmp_path, '{"prompt": "x"}\n{"x": 1}', "prompts.txt")
    assert "name the file *.jsonl" in error.message
    (error,) = _read(tmp_path, '{"messages": []}', "prompts.txt")
    assert "name the file *.jsonl" in error.message
    assert request.prompt == '{"x": 1}'


def test_prompts_file_that_cannot_be_read_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl", BASE)
    with pytest.raises(ValueError, match="directory"):
        read_prompts(tmp_path, BASE)


@pytest.mark.parametrize(
    ("line", "default_id", "message"),
    [
        ('{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "line-2", "temperature"),
        ('{"prompt": "x", "id": "\\ud800"}', "line-2", "half a surrogate"),
        ('{"prompt": "x", "id": ""}', "line-2", "not empty"),
        ('{"prompt": "x", "top_p": 1e-46}', "line-2", "top_p=1e-46"),
        ('{"prompt": "x", "presence_penalty": ""}', "line-2", "presence_penalty"),
        ('{"prompt": "x", "min_tokens": null}', "line-2", "min_tokens"),
        ('{"prompt": "x", "id": "a"}', "line-2", "'a' was used in line 1"),
    ],
)
def test_what_json_allows_and_a_request_does_not_is_an_error_of_its_line(tmp_path, line, default_id, message):
    first, bad, last = _read(tmp_path, f'{{"prompt": "y", "id": "a"}}\n{line}\n{{"prompt": "z"}}\n')
    assert (first.prompt, last.prompt) == ("y", "z")
    assert isinstance(bad, PromptError) and bad.id == default_id
    assert "prompts.jsonl:2:" in bad.message and message in bad.message
