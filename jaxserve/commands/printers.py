"""How a command line shows results: as text, as a stream of text, or as JSON lines (see `as_json`)."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.commands.prompts import ChatRequest, Entry, PromptError
from jaxserve.commands.results_file import ResultsFile
from jaxserve.engine.live_requests import Update
from jaxserve.request import CompletionOutput, RequestOutput, TokenLogprob


class Sink:
    """A place for results; this one only reports refused requests."""

    def refuse(self, request_id: str, error: str) -> None:
        """Reports a request that is not served."""
        print(f"error: {request_id}: {error}", file=sys.stderr)

    def take(self, update: Update) -> None:
        """Takes an update of the engine."""

    def end(self) -> None:
        """Is called after the last update."""


class JsonWriter(Sink):
    """A sink that writes one JSON line per request as soon as it finishes."""

    def __init__(self, file: ResultsFile) -> None:
        self._file = file

    def refuse(self, request_id: str, error: str) -> None:
        super().refuse(request_id, error)
        self._file.write({"id": request_id, "error": error})

    def take(self, update: Update) -> None:
        if update.output is not None:
            self._file.write(as_json(update.output))


class TextPrinter(Sink):
    """A sink that prints the prompt and the text of each sample, in the order of the requests."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._order = [entry.id for entry in entries]
        self._prompts = {entry.id: _shown_prompt(entry) for entry in entries}
        self._results: dict[str, RequestOutput | None] = {}

    def refuse(self, request_id: str, error: str) -> None:
        super().refuse(request_id, error)
        self._results[request_id] = None

    def take(self, update: Update) -> None:
        if update.output is not None:
            self._results[update.request_id] = update.output
        while self._order and self._order[0] in self._results:
            self._print(self._results.pop(self._order.pop(0)))

    def end(self) -> None:
        for request_id in self._order:
            self._print(self._results.get(request_id))

    def _print(self, result: RequestOutput | None) -> None:
        if result is None:
            return
        for output in result.outputs:
            name = sample_name(result.request_id, output.index, len(result.outputs))
            text = f"{self._prompts[result.request_id]}{output.text}" or _token_list(output)
            print(f"--- {name} ({_reason(output)})\n{text}\n", flush=True)


class StreamPrinter(Sink):
    """A sink that prints text while it is generated. Of several samples it prints whole lines, each after its sample's name."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._prompts = {entry.id: _shown_prompt(entry) for entry in entries}
        self._num_samples = {entry.id: _num_samples(entry) for entry in entries}
        self._alone = list(self._num_samples.values()) == [1]
        self._lines: dict[tuple[str, int], str] = {}  # the part of each sample's last line that has come so far
        self._at_line_start = True

    def take(self, update: Update) -> None:
        key = (update.request_id, update.index)
        begun = key in self._lines
        text = ("" if begun else self._prompts[update.request_id]) + update.text
        if self._alone:
            self._lines[key] = ""
            self._write(text)
        else:
            *whole, rest = (self._lines.get(key, "") + text).split("\n")
            self._lines[key] = rest
            for line in whole:
                self._write_line(key, line)
        for output in () if update.output is None else update.output.outputs:
            self._finish((update.request_id, output.index), output)

    def end(self) -> None:
        for key in self._lines:
            self._write_rest(key)
        if not self._at_line_start:
            self._write("\n")

    def _finish(self, key: tuple[str, int], output: CompletionOutput) -> None:
        self._write_rest(key)
        if not output.text and output.token_ids:
            if self._alone:
                self._write(_token_list(output))
            else:
                self._write_line(key, _token_list(output))

    def _write_rest(self, key: tuple[str, int]) -> None:
        if rest := self._lines.get(key):
            self._write_line(key, rest)
        self._lines[key] = ""

    def _write_line(self, key: tuple[str, int], line: str) -> None:
        self._write(f"{sample_name(*key, self._num_samples[key[0]])}| {line}\n")

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._at_line_start = text.endswith("\n")


def sample_name(request_id: str, index: int, num_samples: int) -> str:
    """Returns the name of a sample in text: the id of its request, with its index if there are several samples."""
    return f"{request_id}[{index}]" if num_samples > 1 else request_id


def as_json(result: RequestOutput) -> dict[str, Any]:
    """Returns a result as a JSON object.

    It has `id`, `prompt`, `prompt_token_ids`, `prompt_logprobs`, `seed`, `metrics` and `error`. The fields of a sample are
    `text`, `token_ids`, `finish_reason`, `stop_reason`, `cumulative_logprob` and `logprobs`: a single sample has them beside
    those of the request, several samples have one object each in `outputs`. Log probabilities are there if the request asks
    for them, and `error` if there was one. A log probability that is not finite is null, because JSON cannot express it.
    """
    samples = [_completion(output) for output in result.outputs]
    many = [{"index": output.index, **sample} for output, sample in zip(result.outputs, samples, strict=True)]
    record: dict[str, Any] = {
        "id": result.request_id,
        "prompt": result.prompt,
        "prompt_token_ids": list(result.prompt_token_ids),
        **({"outputs": many} if len(many) > 1 else samples[0]),
        "seed": result.seed,
        "metrics": None if result.metrics is None else dataclasses.asdict(result.metrics),
    }
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if places is None else _places(places) for places in result.prompt_logprobs]
    if result.error is not None:
        record["error"] = result.error
    return record


def _completion(output: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": list(output.stop_reason) if isinstance(output.stop_reason, tuple) else output.stop_reason,
    }
    if output.logprobs is not None:
        record["cumulative_logprob"] = _finite(output.cumulative_logprob)
        record["logprobs"] = [_places(places) for places in output.logprobs]
    return record


def _places(places: Mapping[int, TokenLogprob]) -> dict[str, Any]:
    return {
        str(token): dataclasses.asdict(place) | {"logprob": _finite(place.logprob)} for token, place in places.items()
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _shown_prompt(entry: Entry) -> str:
    """Returns the text to print before the answer; it is empty in a chat."""
    return "" if isinstance(entry, ChatRequest | PromptError) else entry.prompt or ""


def _num_samples(entry: Entry) -> int:
    if isinstance(entry, PromptError):
        return 1
    return (entry.request if isinstance(entry, ChatRequest) else entry).params.n


def _token_list(output: CompletionOutput) -> str:
    return f"token ids: {list(output.token_ids)}"


def _reason(output: CompletionOutput) -> str:
    return f"{output.finish_reason}" + ("" if output.stop_reason is None else f": {output.stop_reason!r}")
