"""The command line, as a subprocess: what a user types and what comes back."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests import small_model

ROOT = pathlib.Path(__file__).parent.parent
# Tests may have been started in the background, where shells have Ctrl-C ignored.
WITH_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def command(checkpoint: pathlib.Path | str, *arguments: str) -> list[str]:
    capacities = [f"--{name}={value}" for name, value in small_model.CAPACITIES.items()]
    cache = f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    model = ["--model", str(checkpoint), "--dtype", "float32", cache]
    return [sys.executable, "-m", "jaxserve.generate", *model, *capacities, *arguments]


def run(checkpoint: pathlib.Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(checkpoint, *arguments), cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_text_is_printed_after_its_prompt_and_a_summary_goes_to_stderr(checkpoint: pathlib.Path) -> None:
    done = run(
        checkpoint, "--prompt", "the cat", "--prompt", "a dog", "--temperature=0", "--max_tokens=4", "--ignore_eos"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("--- prompt-1 (length)\nthe cat") < done.stdout.index("--- prompt-2 (length)\na dog")
    for words in ("2 requests", "tokens/s", "mean slot occupancy", "peak page use", "preemptions", "compiled in"):
        assert words in done.stderr


def test_json_lines_come_back_with_a_bad_line_reported_in_its_place(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"id": "first", "prompt": "the cat", "max_tokens": 3, "temperature": 0, "logprobs": 2, "ignore_eos": True},
        {"prompt": "x", "temperature": 9},
        {"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "seed": 5, "ignore_eos": True},
        {"prompt_token_ids": [1] * 200},
        {"prompt": "y", "stop": [""]},
    ]
    prompts.write_text("\n".join([*map(json.dumps, lines), "{"]) + "\n")
    done = run(checkpoint, "--prompts_file", str(prompts), "--output", str(output))
    assert done.returncode == 1
    records = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert set(records) == {"first", "line-2", "line-3", "line-4", "line-5", "line-6"}
    first = records["first"]
    assert first["prompt"] == "the cat" and first["finish_reason"] == "length" and len(first["token_ids"]) == 3
    assert all(str(token) in places for token, places in zip(first["token_ids"], first["logprobs"], strict=True))
    assert records["line-3"]["seed"] == 5 and "logprobs" not in records["line-3"]
    for number, words in {2: "temperature=9", 4: "max_model_len=96", 5: "stop", 6: "not valid JSON"}.items():
        assert words in records[f"line-{number}"]["error"], records[f"line-{number}"]
    for number in (2, 5, 6):
        assert f"prompts.jsonl:{number}:" in records[f"line-{number}"]["error"]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_stream_prints_the_same_text_as_it_comes(checkpoint: pathlib.Path) -> None:
    arguments = ("--prompt", "the cat", "--temperature=1", "--seed=4", "--max_tokens=30", "--ignore_eos")
    whole = run(checkpoint, *arguments).stdout
    process = subprocess.Popen(
        command(checkpoint, *arguments, "--stream"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    pieces = []
    while piece := os.read(process.stdout.fileno(), 4096):
        pieces.append(piece)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    streamed = b"".join(pieces).decode()
    streamed = streamed.replace("\r\n", "\n").replace("\r", "\n")  # as subprocess does to `whole`
    assert streamed.strip() and streamed.rstrip("\n") in whole
    assert len(pieces) > 3


def test_a_chat_goes_through_the_template(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out.jsonl"
    common = ("--temperature=0", "--max_tokens=6", "--ignore_eos", "--output", str(output))
    assert run(checkpoint, "--chat", "--prompt", "hello", *common).returncode == 0
    chat = json.loads(output.read_text())
    assert run(checkpoint, "--prompt", "<user>hello\n<assistant>", *common).returncode == 0
    plain = json.loads(output.read_text())
    assert chat["prompt"] == "hello" and chat["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt"),
        (("--prompt", "x", "--top_p=2"), "top_p=2.0"),
        (("--prompt", "x", "--output", "/nonexistent/out.jsonl"), "/nonexistent/out.jsonl"),
        (("--prompts_file", "/nonexistent.jsonl"), "/nonexistent.jsonl"),
        (("--prompt", "x", "--num_pages=3"), "num_pages=3"),
        (("--prompt", "x", "--max_model_len=4096"), "max_model_len=4096"),
        (("--prompt", "x", "--config", "/nonexistent.json"), "/nonexistent.json"),
        (("--prompt", "x", "--no_such_flag"), "no_such_flag"),
        (("stray",), "stray"),
        (("--prompt", "x", "--output", ""), "path of the results file is empty"),
        (("--prompt", "x", "--seed=-1"), "--seed=-1"),
        (("--prompt", "x", "--max_queue=2"), "max_queue=2 must be at least max_slots=4"),
        (("--prompts_file", "/dev/null"), "has no prompts"),
    ],
)
def test_bad_flags_get_one_sentence_and_status_1(
    checkpoint: pathlib.Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(checkpoint, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stdout == ""


def test_a_model_that_is_not_there_gets_one_sentence(tmp_path: pathlib.Path) -> None:
    done = run(str(tmp_path / "nothing"), "--prompt", "x")
    assert done.returncode == 1 and "nothing" in done.stderr


def test_interrupting_keeps_what_has_finished(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
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
    again = run(checkpoint, "--prompts_file", str(prompts), "--output", str(output))
    assert again.returncode == 1 and str(partial) in again.stderr
    assert len(partial.read_text().splitlines()) == len(records)
