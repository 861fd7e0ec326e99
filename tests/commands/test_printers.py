"""The output of the command line, from updates made by hand."""

import json
import pathlib

import pytest

from jaxserve import Request, SamplingParams
from jaxserve.commands.printers import JsonWriter, Sink, StreamPrinter, TextPrinter, as_json
from jaxserve.commands.prompts import ChatRequest, Entry, PromptError
from jaxserve.commands.results_file import ResultsFile
from jaxserve.engine.live_requests import Update
from jaxserve.request import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob

METRICS = RequestMetrics(arrival_time=1.0, first_token_time=1.5, finish_time=2.0, num_preemptions=3)


def entry(name: str, prompt: str = "once", *, n: int = 1) -> Request:
    return Request(name, prompt, params=SamplingParams(n=n))


def finished(name: str, *texts: str, tokens: int = 2) -> RequestOutput:
    outputs = [CompletionOutput(i, text, tuple(range(tokens)), "length") for i, text in enumerate(texts)]
    return RequestOutput(name, "once", (7, 8), tuple(outputs), METRICS, seed=4)


def show(sink: Sink, updates: list[Update], capsys: pytest.CaptureFixture[str]) -> str:
    for update in updates:
        sink.take(update)
    sink.end()
    return capsys.readouterr().out


def test_samples_are_printed_one_after_the_other_with_their_index(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TextPrinter([entry("a", n=2), entry("b")])
    updates = [
        Update("b", " more", (1,), finished("b", " more")),
        Update("a", " x", (1,), None, index=1),
        Update("a", " y", (1,), finished("a", " y", " x"), index=0),
    ]
    assert show(sink, updates, capsys) == (
        "--- a[0] (length)\nonce y\n\n--- a[1] (length)\nonce x\n\n--- b (length)\nonce more\n\n"
    )


def test_what_stopped_a_sample_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = RequestOutput("a", "once", (7,), (CompletionOutput(0, " so", (1, 2), "stop", "\n"),))
    assert show(TextPrinter([entry("a")]), [Update("a", "", (), result)], capsys) == "--- a (stop: '\\n')\nonce so\n\n"


def test_text_that_is_empty_is_printed_as_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    update = Update("a", "", (0, 1), finished("a", ""))
    only_tokens = Request("a", prompt_token_ids=(1,))
    assert show(TextPrinter([only_tokens]), [update], capsys) == "--- a (length)\ntoken ids: [0, 1]\n\n"
    assert show(StreamPrinter([only_tokens]), [update], capsys) == "token ids: [0, 1]\n"
    assert "a| token ids: [0, 1]\n" in show(StreamPrinter([only_tokens, entry("b")]), [update], capsys)


def test_a_stream_of_one_sample_is_its_text_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    sink, pieces = StreamPrinter([entry("a")]), []
    for update in [Update("a", " up", (1,)), Update("a", "", (2,)), Update("a", "on", (3,), finished("a", " upon"))]:
        sink.take(update)
        pieces.append(capsys.readouterr().out)
    sink.end()
    assert pieces == ["once up", "", "on"] and capsys.readouterr().out == "\n"


def test_a_stream_of_several_samples_has_lines_led_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    sink = StreamPrinter([entry("a", n=2), entry("b")])
    updates = [
        Update("a", " x", (1,), index=1),
        Update("a", " y\nz", (1,), index=0),
        Update("b", "\n", (1,)),
        Update("a", "1\n2", (1,), index=1),
        Update("b", "end", (1,), finished("b", "\nend")),
        Update("a", "0", (1,), finished("a", " y\nz0", " x1\n2"), index=0),
    ]
    assert show(sink, updates, capsys) == "a[0]| once y\nb| once\na[1]| once x1\nb| end\na[0]| z0\na[1]| 2\n"


def test_a_stream_of_several_samples_of_one_request_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    updates = [Update("a", "\n", (1,), index=i) for i in (0, 1)]
    assert show(StreamPrinter([entry("a", n=2)]), updates, capsys) == "a[0]| once\na[1]| once\n"


def test_what_has_come_of_a_line_is_printed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    sink = StreamPrinter([entry("a"), entry("b"), PromptError("c", "bad")])
    assert show(sink, [Update("a", " up", (1,))], capsys) == "a| once up\n"


def test_a_chat_prints_answers_only(capsys: pytest.CaptureFixture[str]) -> None:
    chat: Entry = ChatRequest(entry("a"), ({"role": "user", "content": "once"},))
    update = Update("a", "hi", (1,), finished("a", "hi"))
    assert show(TextPrinter([chat]), [update], capsys) == "--- a (length)\nhi\n\n"
    assert show(StreamPrinter([chat]), [update], capsys) == "hi\n"


def test_a_result_of_one_sample_is_a_flat_record() -> None:
    assert as_json(finished("a", " more")) == {
        "id": "a",
        "prompt": "once",
        "prompt_token_ids": [7, 8],
        "text": " more",
        "token_ids": [0, 1],
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 4,
        "metrics": {"arrival_time": 1.0, "first_token_time": 1.5, "finish_time": 2.0, "num_preemptions": 3},
    }


def test_a_result_of_several_samples_has_them_in_outputs() -> None:
    record = as_json(finished("a", "x", "y"))
    assert [(sample["index"], sample["text"]) for sample in record["outputs"]] == [(0, "x"), (1, "y")]
    assert "text" not in record


@pytest.mark.parametrize(("reason", "written"), [("END", "END"), (5, 5), ((5, 6), [5, 6]), (None, None)])
def test_stop_reason_is_a_text_a_token_or_a_list_of_tokens(reason: object, written: object) -> None:
    output = CompletionOutput(0, "", (5, 6), "stop", reason)  # type: ignore[arg-type]
    assert json.loads(json.dumps(as_json(RequestOutput("a", None, (1,), (output,)))))["stop_reason"] == written


def test_log_probabilities_are_finite_or_null(tmp_path: pathlib.Path) -> None:
    infinite, nan = TokenLogprob(-float("inf"), 9, None), TokenLogprob(float("nan"), 1, "x")
    fine = TokenLogprob(-0.5, 1, "y")
    output = CompletionOutput(0, "y", (3,), "error", None, ({3: fine, 4: infinite},), float("nan"))
    result = RequestOutput("a", "p", (1, 2), (output,), error="bad weights", prompt_logprobs=(None, {2: nan}))
    with ResultsFile(tmp_path / "out.jsonl") as file:
        JsonWriter(file).take(Update("a", "y", (3,), result))
    record = json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["logprobs"] == [
        {
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": "y"},
            "4": {"logprob": None, "rank": 9, "decoded_token": None},
        }
    ]
    assert record["prompt_logprobs"] == [None, {"2": {"logprob": None, "rank": 1, "decoded_token": "x"}}]
    assert record["cumulative_logprob"] is None and record["error"] == "bad weights"
