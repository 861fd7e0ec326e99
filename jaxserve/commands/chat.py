"""A conversation in a terminal: it reads a line, prints the answer while it is generated, and keeps both for the next turn."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from jaxserve.commands.prompts import ChatRequest, Message
from jaxserve.engine import Engine
from jaxserve.request import Request, RequestOutput, SamplingParams
from jaxserve.timeline import recording

SIGN = "> "


class Conversation:
    """The messages of a conversation, as many as fit the engine's longest sequence, and the answer to the last one.

    Attributes:
      messages: the messages so far, the oldest first.
      max_len: tokens of the engine's longest sequence.
      result: the last answer; None before the first one.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        """Starts with the system message, if there is one.

        Args:
          engine: an engine that serves nothing else during the conversation.
          params: the sampling parameters of each answer, for one sample with text.
          system: the text of the system message.

        Raises:
          ValueError: if the model has no tokenizer or no chat template, or the template refuses the system message.
        """
        self._engine = engine
        self._params = params
        self._num_turns = 0
        self.max_len = engine.config.max_sequence_len
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._num_fixed = len(self.messages)
        self.result: RequestOutput | None = None
        self._request([*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str) -> int:
        """Adds the user's message; returns how many of the oldest messages were dropped to make room.

        Raises:
          ValueError: if the message is not valid or too long; the conversation is then unchanged.
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
        """Yields the answer piece by piece. Once `stop` is set, the answer ends with what there is."""
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
        """Whether the last answer ended because it reached the longest sequence."""
        result = self.result
        return result is not None and len(result.prompt_token_ids) + len(result.outputs[0].token_ids) >= self.max_len

    def _fitting_request(self) -> Request:
        """Drops the oldest exchanges until a quarter of the longest sequence is free for the answer; returns the request."""
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


def chat_in_terminal(engine: Engine, params: SamplingParams, system: str | None, timeline: str | None) -> None:
    """Holds a conversation on stdin and stdout until stdin ends, then prints a summary.

    Args:
      engine, params, system: see `Conversation`.
      timeline: the file in which the timeline is drawn at the end; None for no timeline.

    Raises:
      ValueError: if the model cannot chat, or the timeline cannot be saved.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (it lets `input` edit lines)
    conversation = Conversation(engine, params, system)
    engine.warm_up()
    print("Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
    with recording(engine, timeline):
        converse(
            conversation,
            read=input,
            write=lambda text: print(text, end="", flush=True),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(engine.stats.summary(), file=sys.stderr)


def converse(
    conversation: Conversation, read: Callable[[str], str], write: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Takes turns until there is nothing more to read. Ctrl-C ends an answer, but not the conversation.

    Args:
      conversation: continues from its present state.
      read: prints its argument and returns a line, like `input`; EOFError ends the conversation.
      write: prints a piece of text at once.
      say: prints a line that does not come from the model.
    """
    while True:
        try:
            text = read(SIGN)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # drops the line that was being typed
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
    """Returns a note on how the last answer ended, or None if the model ended it."""
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
    """Lets Ctrl-C set the event instead of raising KeyboardInterrupt."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
