"""The command line and its output: in a process of its own, or here with an engine that is shared."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxserve import DEMO_MODEL, Engine, EngineConfig, QueueFullError, Request
from jaxserve.commands import generation
from jaxserve.commands.options import INTERRUPTED
from tests import small_model
from tests.command_line import ROOT, command, options_of, run, run_here

# Tests may have been started in the background, where shells have Ctrl-C ignored.
WITH_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(checkpoint: pathlib.Path) -> Engine:
    return Engine.from_pretrained(str(checkpoint), dtype="float32", config=EngineConfig(**small_model.CAPACITIES))


def test_text_is_printed_after_its_prompt_and_a_summary_goes_to_stderr(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.reset_stats()
    arguments = ("--prompt", "the cat", "--prompt", "a dog", "--temperature=0", "--max_tokens=4", "--ignore_eos")
    assert run_here(engine, *arguments) == 0
    output = capsys.readouterr()
    assert output.out.index("--- prompt-1 (length)\nthe cat") < output.out.index("--- prompt-2 (length)\na dog")
    for words in ("2 requests", "tokens/s", "mean slot occupancy", "peak page use", "preemptions", "compiled in"):
        assert words in output.err


def test_json_lines_come_back_with_a_bad_line_reported_in_its_place(engine: Engine, tmp_path: pathlib.Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"id": "first", "prompt": "the cat", "max_tokens": 3, "temperature": 0, "logprobs": 2, "ignore_eos": True},
        {"prompt": "x", "temperature": 9},
        {"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "seed": 5, "ignore_eos": True},
        {"prompt_token_ids": [1] * 200},
        {"prompt": "y", "stop": [""]},
        {"messages": [{"role": "user", "content": "z"}], "prompt_logprobs": 1, "max_tokens": 2, "min_tokens": 2},
    ]
    prompts.write_text("\n".join([*map(json.dumps, lines), "{"]) + "\n")
    assert run_here(engine, "--prompts_file", str(prompts), "--output", str(output)) == 1
    records = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert set(records) == {"first", "line-2", "line-3", "line-4", "line-5", "line-6", "line-7"}
    first = records["first"]
    assert first["prompt"] == "the cat" and first["finish_reason"] == "length" and len(first["token_ids"]) == 3
    assert all(str(token) in places for token, places in zip(first["token_ids"], first["logprobs"], strict=True))
    assert records["line-3"]["seed"] == 5 and "logprobs" not in records["line-3"]
    chat = records["line-6"]
    assert chat["prompt"] == "z" and len(chat["prompt_token_ids"]) == len(chat["prompt_logprobs"]) > 2
    assert chat["prompt_logprobs"][0] is None and str(chat["prompt_token_ids"][1]) in chat["prompt_logprobs"][1]
    for number, words in {2: "temperature=9", 4: "max_model_len=96", 5: "stop", 7: "not valid JSON"}.items():
        assert words in records[f"line-{number}"]["error"], records[f"line-{number}"]
    for number in (2, 5, 7):
        assert f"prompts.jsonl:{number}:" in records[f"line-{number}"]["error"]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_stream_prints_the_same_text_as_it_comes(
    checkpoint: pathlib.Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompt", "the cat", "--temperature=1", "--seed=4", "--max_tokens=30", "--ignore_eos")
    assert run_here(engine, *arguments) == 0
    whole = capfd.readouterr().out
    process = subprocess.Popen(
        command(checkpoint, *arguments, "--stream"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    pieces = []
    while piece := os.read(process.stdout.fileno(), 4096):
        pieces.append(piece)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    streamed = b"".join(pieces).decode()
    assert streamed.strip() and streamed.rstrip("\n") in whole
    assert len(pieces) > 3


def test_parameters_from_flags_reach_the_model(engine: Engine, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out.jsonl"
    base = ("--prompt=the cat", "--max_tokens=5", "--temperature=0", f"--output={output}")
    for arguments, tokens in (
        (("--allowed_token_ids=70", "--ignore_eos"), [70] * 5),
        (("--logit_bias=71:100", "--ignore_eos"), [71] * 5),
        (("--logit_bias=72:100", "--stop_token_ids=72", "--min_tokens=0"), [72]),
    ):
        assert run_here(engine, *base, *arguments) == 0
        assert json.loads(output.read_text())["token_ids"] == tokens
    allowed = ("--allowed_token_ids=70,71", "--ignore_eos", "--frequency_penalty=2", "--prompt_logprobs=2")
    assert run_here(engine, *base, *allowed, "--logprobs=1", "--logprobs_mode=processed") == 0
    record = json.loads(output.read_text())
    assert set(record["token_ids"]) == {70, 71}
    assert all({int(token) for token in places} <= {70, 71} for places in record["logprobs"])
    assert len(record["prompt_logprobs"]) == len(record["prompt_token_ids"])


def test_a_stop_text_from_a_flag_is_cut_off_unless_it_is_to_stay(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompt=the cat", "--max_tokens=5", "--allowed_token_ids=66", "--stop=aaa", "--temperature=0")
    letter = engine.tokenizer.decode([66])
    arguments = tuple(argument.replace("aaa", 3 * letter) for argument in arguments)
    assert run_here(engine, *arguments) == 0
    assert capsys.readouterr().out == f"--- prompt-1 (stop: {3 * letter!r})\nthe cat\n\n"
    assert run_here(engine, *arguments, "--include_stop_str_in_output") == 0
    assert capsys.readouterr().out == f"--- prompt-1 (stop: {3 * letter!r})\nthe cat{3 * letter}\n\n"


def test_a_chat_goes_through_the_template(engine: Engine, tmp_path: pathlib.Path) -> None:
    output, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    common = ("--temperature=0", "--max_tokens=6", "--ignore_eos", "--output", str(output))
    user, system = ({"role": role, "content": f"{role}s say"} for role in ("user", "system"))
    prompts.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in ([user], [system, user])))

    def tokens(*arguments: str) -> list[tuple[str, list[int]]]:
        assert run_here(engine, *arguments, *common) == 0
        records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["id"])
        return [(record["prompt"], record["token_ids"]) for record in records]

    ((_, plain),) = tokens("--prompt", "<user>users say\n<assistant>")
    ((_, led),) = tokens("--prompt", "<system>systems say\n<user>users say\n<assistant>")
    assert tokens("--chat", "--prompt", "users say") == [("users say", plain)]
    assert tokens("--chat", "--prompt", "users say", "--system=systems say") == [("users say", led)]
    assert tokens("--prompts_file", str(prompts)) == [("users say", plain), ("users say", led)]
    assert tokens("--prompts_file", str(prompts), "--chat", "--system=systems say") == [("users say", led)] * 2


def test_samples_are_printed_streamed_and_written_with_their_index(
    engine: Engine, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    arguments = (
        "--prompt=the cat",
        "--n=2",
        "--seed=3",
        "--max_tokens=4",
        "--ignore_eos",
        "--allowed_token_ids=66,67,68",
    )
    output = tmp_path / "out.jsonl"
    assert run_here(engine, *arguments, f"--output={output}") == 0
    samples = json.loads(output.read_text())["outputs"]
    assert [sample["index"] for sample in samples] == [0, 1] and samples[0]["text"] != samples[1]["text"]
    texts = [sample["text"] for sample in samples]
    capsys.readouterr()
    assert run_here(engine, *arguments) == 0
    assert capsys.readouterr().out == "".join(
        f"--- prompt-1[{index}] (length)\nthe cat{text}\n\n" for index, text in enumerate(texts)
    )
    assert run_here(engine, *arguments, "--stream") == 0
    lines = [f"prompt-1[{index}]| the cat{text}" for index, text in enumerate(texts)]
    assert sorted(capsys.readouterr().out.splitlines()) == lines


def test_a_chat_with_a_prompt_answers_once(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--chat", "--stream", "--prompt=hi", "--max_tokens=5", "--allowed_token_ids=66", "--ignore_eos")
    assert run_here(engine, *arguments) == 0
    assert capsys.readouterr().out == 5 * engine.tokenizer.decode([66]) + "\n"


def test_a_request_that_may_not_wait_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(request: Request) -> None:
        raise QueueFullError("too many wait")

    monkeypatch.setattr(engine, "add_request", refuse)
    assert run_here(engine, "--prompt=x") == 1
    assert "error: prompt-1: too many wait\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt=x", "--output=/nonexistent/out.jsonl"), "/nonexistent/out.jsonl"),
        (("--prompt=x", "--output="), "path of the results file is empty"),
        (("--prompts_file=/nonexistent.jsonl",), "/nonexistent.jsonl"),
        (("--prompts_file=/dev/null",), "has no prompts"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(engine: Engine, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_here(engine, *arguments)


def test_a_line_may_have_the_id_that_a_prompt_flag_would_get(engine: Engine, tmp_path: pathlib.Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "y", "id": "prompt-1"}\n{oops')
    arguments = ("--prompt=x", "--prompt=z", f"--prompts_file={prompts}", f"--output={output}", "--max_tokens=1")
    assert run_here(engine, *arguments) == 1
    records = {record["id"]: record.get("prompt") for record in map(json.loads, output.read_text().splitlines())}
    assert records == {"prompt-1": "y", "prompt-1-2": "x", "prompt-2": "z", "line-2": None}


@pytest.mark.parametrize("where", ["make_engine", "add_request", "step"])
@pytest.mark.parametrize("lines", ['{"prompt": "x"}', '{oops\n{"prompt": "x"}'])
def test_interrupted_before_anything_finished_it_says_what_is_in_the_file(
    engine: Engine,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    lines: str,
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(lines)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where != "make_engine":
            patch.setattr(engine, where, interrupt)
        make_engine = interrupt if where == "make_engine" else lambda _: engine
        options = options_of(f"--prompts_file={prompts}", f"--output={output}")
        assert generation.run(options, make_engine=make_engine) == INTERRUPTED
    engine.abort("line-1")
    engine.abort("line-2")
    while engine.has_unfinished:
        engine.step()
    stderr, partial = capsys.readouterr().err, tmp_path / "out.jsonl.partial"
    has_refused_line = "oops" in lines and where != "make_engine"
    assert partial.exists() == has_refused_line == (str(partial) in stderr)
    if has_refused_line:
        assert json.loads(partial.read_text())["id"] == "line-1"
    else:
        assert "do not exist: none was written" in stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt"),
        (("--prompt", "x", "--top_p=2"), "top_p=2.0"),
        (("--prompt", "x", "--max_model_len=4096"), "max_model_len=4096"),
        (("--prompt", "x", "--no_such_flag"), "no_such_flag"),
        (("stray",), "stray"),
    ],
)
def test_bad_flags_get_one_sentence_and_status_1(
    checkpoint: pathlib.Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(checkpoint, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stdout == ""


def test_a_model_without_a_chat_template_gets_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Engine.from_pretrained(DEMO_MODEL, config=EngineConfig(max_slots=2, max_model_len=64))
    assert run_here(demo, "--chat", "--prompt=x") == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("error: ") == 1 and "has no chat template" in output.err


def test_a_model_that_is_not_there_gets_one_sentence(tmp_path: pathlib.Path) -> None:
    done = run(str(tmp_path / "nothing"), "--prompt", "x")
    assert done.returncode == 1 and "nothing" in done.stderr


def test_interrupting_keeps_what_has_finished(checkpoint: pathlib.Path, engine: Engine, tmp_path: pathlib.Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    with prompts.open("w") as file:
        for index in range(3000):
            tokens = 1 if index < 4 else 90
            file.write(json.dumps({"prompt_token_ids": [1, 2], "max_tokens": tokens, "ignore_eos": True}) + "\n")
    arguments = command(checkpoint, "--prompts_file", str(prompts), "--output", str(output))
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_CTRL_C, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (partial.exists() and partial.read_text().count("\n") >= 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "interrupted" in stderr and str(partial) in stderr
    records = [json.loads(line) for line in partial.read_text().splitlines()]
    assert 4 <= len(records) < 3000 and all(record["finish_reason"] == "length" for record in records)
    assert not output.exists()
    with pytest.raises(ValueError, match=re.escape(str(partial))):
        run_here(engine, "--prompts_file", str(prompts), "--output", str(output))
    assert len(partial.read_text().splitlines()) == len(records)
