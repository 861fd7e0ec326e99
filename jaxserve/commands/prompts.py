"""Files of prompts in, files of results out; one line each, so that one bad line does not lose the others.

A prompts file whose name ends in .jsonl or .ndjson holds JSON lines, any other holds text:

    text         the line is the prompt, as it is
    JSON lines   {"prompt": "Once upon"}
                 {"prompt_token_ids": [1, 9906], "id": "a", "priority": -1, "temperature": 0, "seed": 7}
                 {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 99}

Blank lines are left out in both. Fields beside these five are sampling parameters of that line; the rest come from the
command line's flags.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import IO, Any, Literal, Self

from jaxserve.request import Request, SamplingParams, unknown_name
from jaxserve.text.tokenizer import Tokenizer

Format = Literal["text", "jsonl"]
Message = Mapping[str, str]  # role and content

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_REQUEST_FIELDS = ("id", "prompt", "prompt_token_ids", "priority")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A conversation whose next message is asked for; a request once the model's template has rendered it."""

    request: Request  # its prompt is the last message's content, which names it in results
    messages: tuple[Message, ...]

    @property
    def id(self) -> str:
        """That of the request."""
        return self.request.id

    def render(self, tokenizer: Tokenizer | None) -> Request:
        """The request, with the tokens of the whole conversation.

        Raises:
          ValueError: if there is no tokenizer or no chat template, or the template refuses the messages.
        """
        if tokenizer is None:
            raise ValueError("a chat needs a model with a tokenizer: give prompt_token_ids instead")
        token_ids = tokenizer.encode(tokenizer.render_chat(self.messages), add_special_tokens=False)
        return dataclasses.replace(self.request, prompt_token_ids=tuple(token_ids))

    def led_by(self, system: str) -> Self:
        """The conversation with this system message, unless it has one."""
        if self.messages[0]["role"] == "system":
            return self
        return dataclasses.replace(self, messages=({"role": "system", "content": system}, *self.messages))


@dataclasses.dataclass(frozen=True)
class PromptError:
    """A line that is not a valid request."""

    id: str  # for the result that reports it
    message: str  # starts with "file:line: "


Entry = Request | ChatRequest | PromptError


def read_prompts(
    path: str | pathlib.Path, defaults: SamplingParams, file_format: Format | None = None
) -> Iterator[Entry]:
    """The requests of a file, line by line.

    Args:
      path: of the file.
      defaults: sampling parameters where a line sets none.
      file_format: None: by the name of the file.

    Raises:
      ValueError: at once, if the file cannot be opened.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed by the iterator)
    except OSError as error:
        raise ValueError(f"cannot read prompts file {str(path)!r}: {error.strerror}") from error
    if file_format is None:
        file_format = "jsonl" if str(path).endswith((".jsonl", ".ndjson")) else "text"
    return _closing(file, parse_prompts(file, str(path), defaults, file_format))


def parse_prompts(lines: Iterable[bytes], name: str, defaults: SamplingParams, file_format: Format) -> Iterator[Entry]:
    """The requests of UTF-8 lines; `name` stands for the file in errors, `line-N` for an id that is not set."""
    parse = _parse_json if file_format == "jsonl" else _parse_text
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text, default_id = "", f"line-{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
            request = parse(text, default_id, defaults)
            if request.id in line_of_id:
                raise ValueError(f"id={request.id!r} was used in line {line_of_id[request.id]}: ids must differ")
            line_of_id[request.id] = number
        except UnicodeDecodeError as error:
            yield PromptError(default_id, f"{name}:{number}: byte {error.start + 1} is not valid UTF-8")
        except ValueError as error:
            own_id = _json_object(text).get("id") if file_format == "jsonl" else None
            if not isinstance(own_id, str) or not own_id or own_id in line_of_id or not _is_unicode(own_id):
                own_id = default_id
            yield PromptError(own_id, f"{name}:{number}: {error}")
        else:
            yield request


class ResultsFile:
    """JSON lines that are there, flushed, as soon as they are written; a context manager.

    Lines go to `<path>.partial`, which takes the place of `path` when all is done. So a file at `path` is
    always whole, and after Ctrl-C or a failure the finished results are in the partial file, and an older
    file at `path` is as it was. A path that is not a regular file (a pipe, /dev/stdout) is written to
    directly.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Opens the file, so that a path that cannot be written is found before any work is done.

        Raises:
          ValueError: if it cannot be written.
        """
        if not str(path):
            raise ValueError("the path of the results file is empty: name a file")
        direct = os.path.exists(path) and not os.path.isfile(path)
        self.path = pathlib.Path(path if direct else os.path.realpath(path))  # a link stays a link
        self.partial_path = self.path if direct else self.path.with_name(self.path.name + ".partial")
        if not direct and self.partial_path.is_file() and self.partial_path.stat().st_size:
            raise ValueError(
                f"{str(self.partial_path)!r} holds results of a run that was interrupted: move it away, or delete it"
            )
        try:
            if os.path.isfile(path) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._file = open(self.partial_path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise ValueError(f"cannot write results to {str(path)!r}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one line."""
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None and self.partial_path != self.path and not self.partial_path.stat().st_size:
            self.partial_path.unlink()
        if kind is None and self.partial_path != self.path:
            os.replace(self.partial_path, self.path)


def _parse_text(text: str, default_id: str, defaults: SamplingParams) -> Request:
    fields = _json_object(text)
    if any(name in fields for name in _PROMPTS):
        raise ValueError("this is a JSON line in a text file: name the file *.jsonl")
    return Request(default_id, prompt=text, params=defaults)


def _json_object(text: str) -> dict[str, Any]:
    """The object that a line holds; empty if it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(text) if text.startswith("{") else None
        if isinstance(fields, dict):
            return fields
    return {}


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _parse_json(text: str, default_id: str, defaults: SamplingParams) -> Request | ChatRequest:
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError('not a JSON object: a line must be like {"prompt": "..."}')
    if sum(name in fields for name in _PROMPTS) != 1:
        raise ValueError("give either prompt or prompt_token_ids or messages")
    known = {*_REQUEST_FIELDS, "messages", *SamplingParams.__dataclass_fields__}
    for name in fields:
        if name not in known:
            raise ValueError(unknown_name("field", name, known))
    messages = _check_messages(fields.pop("messages")) if "messages" in fields else ()
    own = {name: fields.pop(name) for name in _REQUEST_FIELDS if name in fields}
    if messages:
        own["prompt"] = messages[-1]["content"]
    request = Request(**{"id": default_id, **own}, params=defaults.override(fields))
    return ChatRequest(request, messages) if messages else request


def _check_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages={value!r} must be a list of at least one message")
    for index, message in enumerate(value):
        texts = isinstance(message, dict) and all(
            isinstance(text, str) and _is_unicode(text) for text in message.values()
        )
        if not texts or message.keys() != {"role", "content"}:
            raise ValueError(f'messages[{index}]={message!r} must be like {{"role": "user", "content": "..."}}')
    return tuple(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON: use a finite number")


def _closing(file: IO[bytes], requests: Iterator[Entry]) -> Iterator[Entry]:
    with file:
        yield from requests
