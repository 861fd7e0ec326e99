"""Command line: text for prompts.

    python -m jaxserve.generate --prompt "def fibonacci(n):" --temperature 0
    python -m jaxserve.generate --prompts_file prompts.jsonl --output results.jsonl

Results go to stdout, or as JSON lines to --output; a summary goes to stderr. Exit status: 0, 1 after an error (a bad line of a
prompts file is one, though the others are served), 130 after Ctrl-C (what has finished by then is written).
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from jaxserve import cli
from jaxserve.prompts import PromptError, ResultsFile, read_prompts
from jaxserve.request import Request, RequestOutput, SamplingParams
from jaxserve.sequence import Update

_INTERRUPTED = 130
_STREAM_STEPS = 1  # steps per call when streaming

FLAGS = flags.FLAGS
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeatable.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "Prompts: lines of text, or *.jsonl (see the README).")
_OUTPUT = flags.DEFINE_string("output", None, "Write results as JSON lines to this file.")
_CHAT = flags.DEFINE_boolean("chat", False, "Treat prompts as messages of a user, in the model's chat template.")
_STREAM = flags.DEFINE_boolean("stream", False, "Print text as it is generated.")
cli.define_engine_flags()
cli.define_sampling_flags(max_tokens=128)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}: prompts are given with --prompt")
        return _run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone: nobody is left to tell
        return 1
    except (OSError, MemoryError, OverflowError, RuntimeError) as error:
        sentence = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"error: {sentence} (if memory ran out: lower --num_pages, --max_slots or --max_queue)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    params = cli.sampling_params()
    if not _PROMPT.value and _PROMPTS_FILE.value is None:
        raise ValueError('there is nothing to do: give --prompt "some text" or --prompts_file FILE')
    if _STREAM.value and _OUTPUT.value is not None:
        raise ValueError("--stream prints text and --output writes a file: use one of them")
    if not 0 <= FLAGS.seed < 2**64:
        raise ValueError(f"--seed={FLAGS.seed} must lie in [0, 2^64)")
    entries = list(_entries(params))
    if not entries:
        raise ValueError(f"{_PROMPTS_FILE.value!r} has no prompts: give one per line")
    ids = [entry.id for entry in entries]
    if len(set(ids)) < len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"id {repeated!r} is that of a --prompt and of a line of the file: change the line's")
    if _OUTPUT.value is None:
        return _serve(entries, _StreamPrinter(entries) if _STREAM.value else _TextPrinter(entries))
    with ResultsFile(_OUTPUT.value) as file:
        status = _serve(entries, _JsonWriter(file))
        if status == _INTERRUPTED:
            print(f"finished results are in {file.partial_path}", file=sys.stderr)
            raise SystemExit(status)  # leaves the partial file where it is
        return status


def _entries(params: SamplingParams) -> Iterator[Request | PromptError]:
    for index, prompt in enumerate(_PROMPT.value):
        yield Request(id=f"prompt-{index + 1}", prompt=prompt, params=params)
    if _PROMPTS_FILE.value is not None:
        yield from read_prompts(_PROMPTS_FILE.value, params)


def _serve(entries: list[Request | PromptError], sink: "_Sink") -> int:
    engine = cli.make_engine()
    num_bad = 0
    for entry in entries:
        error = entry.message if isinstance(entry, PromptError) else _add(engine, entry)
        if error is not None:
            num_bad += 1
            sink.refuse(entry.id, error)
    status = 1 if num_bad else 0
    try:
        if engine.has_unfinished:
            engine.warm_up()
        with _Progress(len(entries) - num_bad) as advance:
            while engine.has_unfinished:
                for update in engine.step(_STREAM_STEPS if _STREAM.value else None):
                    sink.take(update)
                    if update.output is not None and update.output.error is not None:
                        print(f"error: {update.request_id}: {update.output.error}", file=sys.stderr)
                        status = 1
                    advance(update.output is not None)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    sink.end()
    if status == _INTERRUPTED:
        print(f"interrupted: {engine.stats.num_requests} of {len(entries)} requests finished", file=sys.stderr)
    print(engine.stats.summary(), file=sys.stderr)
    return status


def _add(engine: Any, request: Request) -> str | None:
    """Hands a request to the engine; returns why it was refused, if it was."""
    try:
        if _CHAT.value and request.prompt is not None:
            if engine.tokenizer is None:
                raise ValueError("--chat needs a model with a tokenizer")
            text = engine.tokenizer.render_chat([{"role": "user", "content": request.prompt}])
            token_ids = tuple(engine.tokenizer.encode(text, add_special_tokens=False))
            request = dataclasses.replace(request, prompt_token_ids=token_ids)
        engine.add_request(request)
    except ValueError as error:
        return str(error)
    return None


class _Progress:
    """A bar that counts finished requests, on a terminal and unless text is streamed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Callable[[bool], None]:
        if sys.stderr.isatty() and not _STREAM.value and self._total > 1:
            import tqdm

            self._bar = tqdm.tqdm(total=self._total, unit="request", file=sys.stderr)
        return lambda finished: self._bar.update(1) if finished and self._bar is not None else None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Sink:
    """Where results go."""

    def refuse(self, request_id: str, error: str) -> None:
        """Takes a request that is not served."""
        print(f"error: {request_id}: {error}", file=sys.stderr)

    def take(self, update: Update) -> None:
        """Takes what is new."""

    def end(self) -> None:
        """Comes last."""


class _JsonWriter(_Sink):
    """One JSON line per request, as soon as it is finished."""

    def __init__(self, file: ResultsFile) -> None:
        self._file = file

    def refuse(self, request_id: str, error: str) -> None:
        super().refuse(request_id, error)
        self._file.write({"id": request_id, "error": error})

    def take(self, update: Update) -> None:
        if update.output is not None:
            self._file.write(_as_json(update.output))


class _TextPrinter(_Sink):
    """Prompt and text of each request, in the order of the requests."""

    def __init__(self, entries: list[Request | PromptError]) -> None:
        self._order = [entry.id for entry in entries]
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
        prompt = "" if result.prompt is None or _CHAT.value else result.prompt
        text = f"{prompt}{result.outputs[0].text}" or f"token ids: {list(result.outputs[0].token_ids)}"
        print(f"--- {result.request_id} ({result.outputs[0].finish_reason})\n{text}\n", flush=True)


class _StreamPrinter(_Sink):
    """Text as it comes: of one request as it is, of several line by line, each led by its request's id."""

    def __init__(self, entries: list[Request | PromptError]) -> None:
        self._alone = len(entries) == 1
        self._lines: dict[str, str] = {}
        self._at_line_start = True
        self._begun: set[str] = set()  # requests that have been heard of
        prompts = {entry.id: entry.prompt or "" for entry in entries if isinstance(entry, Request)}
        if not _CHAT.value:
            self._lines = prompts

    def refuse(self, request_id: str, error: str) -> None:
        super().refuse(request_id, error)
        self._lines.pop(request_id, None)

    def take(self, update: Update) -> None:
        self._begun.add(update.request_id)
        text = self._lines.pop(update.request_id, "") + update.text
        if self._alone:
            self._write(text)
            return
        *whole, rest = text.split("\n")
        if update.output is not None:
            whole, rest = [*whole, rest], ""
        for line in whole:
            self._write(f"{update.request_id}| {line}\n")
        self._lines[update.request_id] = rest

    def end(self) -> None:
        for request_id, rest in self._lines.items():
            if rest and not self._alone and request_id in self._begun:
                self._write(f"{request_id}| {rest}\n")
        if not self._at_line_start:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._at_line_start = text.endswith("\n")


def _as_json(result: RequestOutput) -> dict[str, Any]:
    completion = result.outputs[0]
    record: dict[str, Any] = {
        "id": result.request_id,
        "prompt": result.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": result.seed,
        "num_preemptions": result.metrics.num_preemptions if result.metrics is not None else 0,
    }
    if result.error is not None:
        record["error"] = result.error
    if result.prompt is None:
        record["prompt_token_ids"] = list(result.prompt_token_ids)
    if completion.logprobs is not None:
        record["cumulative_logprob"] = completion.cumulative_logprob
        record["logprobs"] = [
            {str(token): dataclasses.asdict(place) for token, place in places.items()} for places in completion.logprobs
        ]
    return record


def entry_point() -> None:
    """Runs `main` under absl."""
    app.run(main)


if __name__ == "__main__":
    entry_point()
