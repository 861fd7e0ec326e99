"""Files of prompts: one line is one prompt, so that one bad line does not lose the others.

A prompts file whose name ends in .jsonl or .ndjson holds JSON lines, any other holds text:

    text         the line is the prompt, as it is
    JSON lines   {"prompt": "Once upon"}
                 {"prompt_token_ids": [1, 9906], "id": "a", "priority": -1, "temperature": 0, "seed": 7}
                 {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 99}

Blank lines are skipped in both. Fields other than these five are sampling parameters of that line; what a line does not set
comes from the flags of the command line.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, Self

from jaxserve.request import Request, SamplingParams, unknown_name
from jaxserve.text.tokenizer import Tokenizer

Format = Literal["text", "jsonl"]
Message = Mapping[str, str]  # role and content

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_REQUEST_FIELDS = ("id", "prompt", "prompt_token_ids", "priority")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A conversation that wants its next message. The model's chat template turns it into a request."""

    request: Request  # its prompt is the content of the last message, by which results show it
    messages: tuple[Message, ...]

    @property
    def id(self) -> str:
        """The id of the request."""
        return self.request.id

    def render(self, tokenizer: Tokenizer | None) -> Request:
        """Returns the request with the tokens of the whole conversation.

        Raises:
          ValueError: if there is no tokenizer or no chat template, or the template refuses the messages.
        """
        if tokenizer is None:
            raise ValueError("a chat needs a model with a tokenizer: give prompt_token_ids instead")
        token_ids = tokenizer.encode(tokenizer.render_chat(self.messages), add_special_tokens=False)
        return dataclasses.replace(self.request, prompt_token_ids=tuple(token_ids))

    def with_system(self, system: str) -> Self:
        """Returns the conversation with this system message in front, unless it has a system message already."""
        if self.messages[0]["role"] == "system":
            return self
        return dataclasses.replace(self, messages=({"role": "system", "content": system}, *self.messages))


@dataclasses.dataclass(frozen=True)
class PromptError:
    """A line that is not a valid request."""

    id: str  # the name under which results report it
    message: str  # starts with "file:line: "


Entry = Request | ChatRequest | PromptError


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line that was read: a request, or the error in its place."""

    number: int  # from 1, blank lines counted
    own_id: str | None  # None: the line gives no usable id
    content: Request | ChatRequest | str


def read_prompts(
    path: str | pathlib.Path, defaults: SamplingParams, file_format: Format | None = None
) -> Iterator[Entry]:
    """Reads the requests of a file; see `parse_prompts`.

    Args:
      path: the file.
      defaults: the sampling parameters that a line does not set.
      file_format: "text" or "jsonl"; None: the file's name decides.

    Raises:
      ValueError: if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            lines = list(file)
    except OSError as error:
        raise ValueError(f"cannot read prompts file {str(path)!r}: {error.strerror}") from error
    if file_format is None:
        file_format = "jsonl" if str(path).endswith((".jsonl", ".ndjson")) else "text"
    return parse_prompts(lines, str(path), defaults, file_format)


def parse_prompts(lines: Iterable[bytes], name: str, defaults: SamplingParams, file_format: Format) -> Iterator[Entry]:
    """Yields an entry for each line that is not blank, in order; no two have the same id.

    If several valid lines give the same id, the first of them gets it, and the others become errors. After that, lines without
    a usable id get one: `line-N` for line N or, where another line gives that id, `line-N-2` and so on.

    Args:
      lines: UTF-8, with or without their line breaks. All are read before the first entry comes, because the last line may
        give an id that the first line must not get.
      name: the name of the file in error messages.
      defaults: the sampling parameters that a line does not set.
      file_format: "text" or "jsonl".
    """
    parsed = [
        _read_line(number, line, name, defaults, file_format)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    line_of_id: dict[str, int] = {}  # the line that an id belongs to: a valid line before one that is not
    for is_error in (False, True):
        for line in parsed:
            if line.own_id is not None and isinstance(line.content, str) == is_error:
                line_of_id.setdefault(line.own_id, line.number)
    for line in parsed:
        is_own = line.own_id is not None and line_of_id[line.own_id] == line.number
        entry_id = line.own_id if is_own and line.own_id else free_id(f"line-{line.number}", line_of_id)
        content = line.content
        if isinstance(content, str):
            yield PromptError(entry_id, content)
        elif line.own_id is not None and not is_own:
            first = line_of_id[line.own_id]
            yield PromptError(
                entry_id, f"{name}:{line.number}: id={line.own_id!r} was used in line {first}: ids must differ"
            )
        elif isinstance(content, ChatRequest):
            yield dataclasses.replace(content, request=dataclasses.replace(content.request, id=entry_id))
        else:
            yield dataclasses.replace(content, id=entry_id)


def free_id(name: str, used: Collection[str]) -> str:
    """Returns `name`, or the first of `name-2`, `name-3`, ... that is not in use."""
    free, number = name, 1
    while free in used:
        number += 1
        free = f"{name}-{number}"
    return free


def _read_line(number: int, line: bytes, name: str, defaults: SamplingParams, file_format: Format) -> _Line:
    text = ""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        if file_format == "text":
            return _Line(number, None, _parse_text(text, defaults))
        request, own_id = _parse_json(text, defaults)
        return _Line(number, own_id, request)
    except UnicodeDecodeError as error:
        return _Line(number, None, f"{name}:{number}: byte {error.start + 1} is not valid UTF-8")
    except ValueError as error:
        own_id = _json_object(text).get("id") if file_format == "jsonl" else None
        is_usable = isinstance(own_id, str) and own_id and _is_unicode(own_id)
        return _Line(number, own_id if is_usable else None, f"{name}:{number}: {error}")


def _parse_text(text: str, defaults: SamplingParams) -> Request:
    fields = _json_object(text)
    if any(name in fields for name in _PROMPTS):
        raise ValueError("this is a JSON line in a text file: name the file *.jsonl")
    return Request(_NO_ID, prompt=text, params=defaults)


def _json_object(text: str) -> dict[str, Any]:
    """Returns the JSON object that a line holds, or an empty one if it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(text) if text.startswith("{") else None
        if isinstance(fields, dict):
            return fields
    return {}


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _parse_json(text: str, defaults: SamplingParams) -> tuple[Request | ChatRequest, str | None]:
    """Returns the request of a JSON line, and the id if the line gives one."""
    try:
        fields = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError('not a JSON object: a line must be like {"prompt": "..."}')
    if sum(name in fields for name in _PROMPTS) != 1:
        raise ValueError("give either prompt or prompt_token_ids or messages")
    names = {*_REQUEST_FIELDS, "messages", *SamplingParams.__dataclass_fields__}
    for name in fields:
        if name not in names:
            raise ValueError(unknown_name("field", name, names))
    messages = _check_messages(fields.pop("messages")) if "messages" in fields else ()
    own = {name: fields.pop(name) for name in _REQUEST_FIELDS if name in fields}
    if messages:
        own["prompt"] = messages[-1]["content"]
    request = Request(**{"id": _NO_ID, **own}, params=defaults.override(fields))
    return ChatRequest(request, messages) if messages else request, own.get("id")


def _check_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages={value!r} must be a list of at least one message")
    for index, message in enumerate(value):
        has_texts = isinstance(message, dict) and all(
            isinstance(text, str) and _is_unicode(text) for text in message.values()
        )
        if not has_texts or message.keys() != {"role", "content"}:
            raise ValueError(f'messages[{index}]={message!r} must be like {{"role": "user", "content": "..."}}')
    return tuple(value)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"field {next(name for name in names if names.count(name) > 1)!r} is there twice: leave one out"
        )
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON: use a finite number")


_NO_ID = "line"  # the id of a request until `parse_prompts` sets it
