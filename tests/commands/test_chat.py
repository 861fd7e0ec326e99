"""Conversations: the messages that the model gets turn by turn, and the output in a terminal."""

import contextlib
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from jaxserve import DEMO_MODEL, Engine, EngineConfig, SamplingParams
from jaxserve.commands.chat import Conversation, converse
from jaxserve.request import Request
from tests import small_model
from tests.command_line import ROOT, command

MAX_LEN = small_model.CAPACITIES["max_model_len"]
# Makes the terminal that is stdin the one whose Ctrl-C is heard.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(checkpoint: pathlib.Path) -> Engine:
    return Engine.from_pretrained(str(checkpoint), dtype="float32", config=EngineConfig(**small_model.CAPACITIES))


class Terminal:
    """A user who types these lines; an exception among them is raised in its turn."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterator[str | type[BaseException]] = iter((*lines, EOFError))
        self.screen = ""
        self.pieces: list[str] = []
        self.interrupt_after: int | None = None  # pieces of text

    def read(self, sign: str) -> str:
        line = next(self._lines)
        self.screen += sign
        if not isinstance(line, str):
            raise line
        self.screen += f"{line}\n"
        return line

    def write(self, text: str) -> None:
        self.screen += text
        self.pieces.append(text)
        if len(self.pieces) == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)

    def say(self, line: str) -> None:
        self.screen += f"{line}\n"

    def talk(self, conversation: Conversation) -> str:
        converse(conversation, self.read, self.write, self.say)
        return self.screen


def params(max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def answer_to(engine: Engine, prompt: str, max_tokens: int = 6) -> str:
    token_ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
    return engine.generate([token_ids], params(max_tokens))[0].outputs[0].text


def test_each_turn_sends_the_whole_conversation_through_the_template(engine: Engine) -> None:
    conversation = Conversation(engine, params(), "be kind")
    screen = Terminal("hi", "  ", "why").talk(conversation)
    first = answer_to(engine, "<system>be kind\n<user>hi\n<assistant>")
    second = answer_to(engine, f"<system>be kind\n<user>hi\n<assistant>{first}\n<user>why\n<assistant>")
    cut = "(cut off after 6 tokens: --max_tokens allows no more)"
    assert screen == f"> hi\n{first}\n{cut}\n\n>   \n> why\n{second}\n{cut}\n\n> \n"
    assert [message["content"] for message in conversation.messages] == ["be kind", "hi", first, "why", second]


def test_an_answer_comes_piece_by_piece(engine: Engine) -> None:
    terminal = Terminal("hi")
    terminal.talk(Conversation(engine, params(20), None))
    assert len([piece for piece in terminal.pieces if piece.strip("\n")]) > 5


def test_ctrl_c_ends_the_answer_and_not_the_chat(engine: Engine) -> None:
    before = signal.getsignal(signal.SIGINT)
    terminal = Terminal("hi", "go on")
    terminal.interrupt_after = 5
    conversation = Conversation(engine, params(50), None)
    screen = terminal.talk(conversation)
    assert screen.count("(stopped)") == 1 and screen.count("> ") >= 3
    stopped = conversation.messages[1]["content"]
    whole = answer_to(engine, "<user>hi\n<assistant>", 50)
    assert stopped and whole.startswith(stopped) and len(stopped) < len(whole)
    resumed = answer_to(engine, f"<user>hi\n<assistant>{stopped}\n<user>go on\n<assistant>", 50)
    assert conversation.messages[3]["content"] == resumed
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_sign_gives_up_the_line(engine: Engine) -> None:
    conversation = Conversation(engine, params(), None)
    screen = Terminal(KeyboardInterrupt, "hi").talk(conversation)
    assert screen.startswith("> \n> hi\n") and len(conversation.messages) == 2


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full(engine: Engine) -> None:
    conversation = Conversation(engine, params(10), "sys")
    screen = Terminal(*("abcdefgh" * 2 for _ in range(5))).talk(conversation)
    assert re.search(rf"\(the context of {MAX_LEN} tokens is full: the oldest [24] messages are forgotten\)\n", screen)
    roles = [message["role"] for message in conversation.messages]
    assert roles[:2] == ["system", "user"] and roles[1:] == ["user", "assistant"] * (len(roles) // 2)
    assert len(roles) < 11 and "error" not in screen


def test_an_answer_that_fills_the_context_says_so(engine: Engine) -> None:
    conversation = Conversation(engine, params(MAX_LEN), None)
    screen = Terminal("hi").talk(conversation)
    assert conversation.is_full and f"tokens: the context of {MAX_LEN} tokens is full)" in screen


def test_a_message_that_is_too_long_or_not_valid_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    conversation = Conversation(engine, params(), None)
    screen = Terminal("hi", "x" * 200, "\ud800", "hi").talk(conversation)
    assert screen.count("error: ") == 2 and f"max_model_len={MAX_LEN}" in screen and "surrogate" in screen
    assert [message["content"] for message in conversation.messages[::2]] == ["hi", "hi"]


def test_a_long_message_takes_the_place_of_all_before_it(engine: Engine) -> None:
    conversation = Conversation(engine, params(4), None)
    Terminal("hi", "so", "x" * 70).talk(conversation)
    assert [message["content"] for message in conversation.messages[::2]] == ["x" * 70]


def test_a_model_without_a_template_or_a_tokenizer_cannot_chat(engine: Engine) -> None:
    demo = Engine.from_pretrained(DEMO_MODEL, config=EngineConfig(max_slots=2, max_model_len=64))
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(demo, params(), None)
    demo.tokenizer = None
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        Conversation(demo, params(), None)


def test_stop_before_the_first_token_leaves_an_empty_answer(engine: Engine) -> None:
    conversation, stop = Conversation(engine, params(), None), threading.Event()
    assert conversation.ask("hi") == 0
    stop.set()
    assert "".join(conversation.answer(stop)) == ""
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}
    engine.add_request(Request("free", prompt_token_ids=(1,), params=params(1)))
    assert any(update.request_id == "free" for _ in range(3) for update in engine.step(1))


@pytest.mark.slow
def test_a_chat_in_a_real_terminal(checkpoint: pathlib.Path) -> None:
    leader, follower = pty.openpty()
    arguments = command(checkpoint, "--chat", "--stream", "--system=sys", "--max_tokens=5", "--allowed_token_ids=68,69")
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *arguments],
        cwd=ROOT,
        env={**os.environ, "TERM": "dumb"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    screen = ""

    def read_until(words: str, *, seconds: float = 240) -> None:
        nonlocal screen
        screen, deadline = "", time.monotonic() + seconds
        while words not in screen and time.monotonic() < deadline:
            if not select.select([leader], [], [], 1)[0]:
                continue
            try:
                screen += os.read(leader, 4096).decode(errors="replace")
            except OSError:  # the other side has closed
                break
        assert words in screen, screen

    read_until("ends the chat.\r\n> ")
    os.write(leader, b"hello\n")
    read_until("\r\n> ")
    assert "(cut off after 5 tokens: --max_tokens allows no more)" in screen
    for _ in range(10):  # one that comes between two reads of the line is for nothing
        os.write(leader, b"\x03")
        with contextlib.suppress(AssertionError):
            read_until("\r\n> ", seconds=5)
            break
    os.write(leader, b"\x04")
    read_until("1 requests")
    assert process.wait(timeout=60) == 0
    os.close(leader)
