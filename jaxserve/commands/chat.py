"""A conversation in a terminal: a line is read, its answer is printed as it comes, and both stay for the next turn."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxserve.commands.prompts import ChatRequest, Message
from jaxserve.request import Request, RequestOutput, SamplingParams

SIGN = "> "


class Conversation:
    """The messages so far, as many as the engine's longest sequence holds, and the answer to the last one."""

    def __init__(self, engine: Any, params: SamplingParams, system: str | None) -> None:
        """Begins with the system message, if there is one.

        Args:
          engine: serves nothing else meanwhile.
          params: of each answer; one sample, with text.
          system: what the system message says.

        Raises:
          ValueError: if the model cannot chat: no tokenizer, no chat template, or one that refuses the system message.
        """
        self._engine = engine
        self._params = params
        self._num_turns = 0
        self.max_len: int = engine.config.max_sequence_len
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._num_fixed = len(self.messages)
        self.result: RequestOutput | None = None  # of the last answer
        self._request([*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str) -> int:
        """Takes the user's message; returns how many of the oldest messages had to go for it.

        Raises:
          ValueError: if the message is not valid or too long; the conversation is then as it was.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        self._num_turns += 1
        try:
            self._engine.add_request(self._fitting_request())
        except ValueError:
            self.messages = before
            raise
        return len(before) + 1 - len(self.messages)

    def answer(self, stop: threading.Event) -> Iterator[str]:
        """Yields the answer piece by piece until it is finished; once `stop` is set it is left at what has come."""
        self.result = None
        while self._engine.has_unfinished:
            if stop.is_set():
                self._engine.abort(f"turn-{self._num_turns}")
            for update in self._engine.step(1):
                self.result = update.output
                yield update.text
        text = "" if self.result is None else self.result.outputs[0].text
        self.messages.append({"role": "assistant", "content": text})

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the longest sequence was reached."""
        result = self.result
        return result is not None and len(result.prompt_token_ids) + len(result.outputs[0].token_ids) >= self.max_len

    def _fitting_request(self) -> Request:
        """The next request; the oldest exchanges go until a quarter of the longest sequence is free for the answer."""
        limit = self.max_len - min(self._params.max_tokens, self.max_len // 4)
        request = self._request(self.messages)
        while len(request.prompt_token_ids or ()) > limit and len(self.messages) > self._num_fixed + 1:
            del self.messages[self._num_fixed : self._num_fixed + 2]  # a question and its answer
            request = self._request(self.messages)
        return request

    def _request(self, messages: list[Message]) -> Request:
        text = messages[-1]["content"]
        request = Request(f"turn-{self._num_turns}", prompt=text, params=self._params)
        return ChatRequest(request, tuple(messages)).render(self._engine.tokenizer)


def converse(
    conversation: Conversation, read: Callable[[str], str], write: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Talks until there is nothing more to read. Ctrl-C ends an answer, not the conversation.

    Args:
      conversation: goes on from where it is.
      read: prints its argument and returns a line, like `input`; EOFError ends the conversation.
      write: prints a piece of text, at once.
      say: prints a line that is not the model's.
    """
    while True:
        try:
            text = read(SIGN)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # gives up the line
            write("\n")
            continue
        if not text.strip():
            continue
        try:
            num_dropped = conversation.ask(text)
        except ValueError as error:
            say(f"error: {error}")
            continue
        if num_dropped:
            say(
                f"(the context of {conversation.max_len} tokens is full: the oldest {num_dropped} messages are forgotten)"
            )
        with _interrupt_sets_event() as stop:
            for piece in conversation.answer(stop):
                write(piece)
        write("\n")
        if remark := _remark(conversation):
            say(remark)
        write("\n")


def _remark(conversation: Conversation) -> str | None:
    """What is to be said about how the last answer ended."""
    result = conversation.result
    if result is None or result.error is not None:
        return f"error: {result.error}" if result is not None else None
    output = result.outputs[0]
    if output.finish_reason == "abort":
        return "(stopped)"
    if output.finish_reason != "length":
        return None
    full = f"the context of {conversation.max_len} tokens is full"
    why = full if conversation.is_full else "--max_tokens allows no more"
    return f"(cut off after {len(output.token_ids)} tokens: {why})"


@contextlib.contextmanager
def _interrupt_sets_event() -> Iterator[threading.Event]:
    """Ctrl-C sets the event in place of raising KeyboardInterrupt."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
