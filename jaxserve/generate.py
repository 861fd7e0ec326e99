"""Command line: text for prompts.

    python -m jaxserve.generate --prompt "def fibonacci(n):" --temperature 0
    python -m jaxserve.generate --prompts_file prompts.jsonl --output results.jsonl
    python -m jaxserve.generate --model Qwen/Qwen3-0.6B --chat --stream

Results go to stdout, or as JSON lines to --output; a summary goes to stderr. Exit status: 0, 1 after an error (a bad line of a
prompts file is one, though the others are served), 130 after Ctrl-C (what has finished by then is written).
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from jaxserve.commands import flags as cli
from jaxserve.commands.chat import Conversation, converse
from jaxserve.commands.printers import JsonWriter, Sink, StreamPrinter, TextPrinter
from jaxserve.commands.prompts import ChatRequest, Entry, PromptError, ResultsFile, read_prompts
from jaxserve.engine.engine import QueueFullError
from jaxserve.request import Request, SamplingParams
from jaxserve.timeline.record import check_path, recording

_INTERRUPTED = 130
_STREAM_STEPS = 1  # steps per call when streaming
_MAX_TOKENS = 128
_MAX_TOKENS_CHAT = 1024
_USAGE = """\
Text for prompts, with continuous batching.

  python -m jaxserve.generate --prompt "def fibonacci(n):" --temperature 0
  python -m jaxserve.generate --prompts_file prompts.jsonl --output results.jsonl
  python -m jaxserve.generate --model Qwen/Qwen3-0.6B --chat --stream

A line of a prompts file may set parameters of its own: {"prompt": "Once upon", "temperature": 0.7}.
--helpfull lists absl's flags too."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, checked."""

    prompts: tuple[str, ...]
    prompts_file: str | None
    output: str | None
    chat: bool
    system: str | None
    stream: bool
    timeline: str | None
    params: SamplingParams
    engine: cli.EngineOptions

    @property
    def interactive(self) -> bool:
        """Whether what to do is to come from the terminal."""
        return not self.prompts and self.prompts_file is None


def define_flags(values: flags.FlagValues) -> None:
    """All flags of the command."""
    to: dict[str, Any] = {"flag_values": values, "module_name": cli.PROMPTS}
    flags.DEFINE_multi_string("prompt", [], "Text to continue.", **to)
    flags.DEFINE_string("prompts_file", None, "Prompts: lines of text, or JSON lines if its name ends in .jsonl.", **to)
    flags.DEFINE_string("output", None, "Write results as JSON lines to this file.", **to)
    flags.DEFINE_boolean("stream", False, "Print text as it is generated.", **to)
    flags.DEFINE_boolean(
        "chat",
        False,
        "Prompts are messages of a user, in the model's chat template. Without a prompt, in a terminal and with --stream: "
        "a conversation.",
        **to,
    )
    flags.DEFINE_string("system", None, "System message of a chat.", **to)
    cli.define_timeline_flag(values)
    cli.define_engine_flags(values, max_waiting="no bound")
    cli.define_sampling_flags(values, max_tokens=f"{_MAX_TOKENS}, in a chat {_MAX_TOKENS_CHAT}")


def help_text(values: flags.FlagValues) -> str:
    """What --help prints."""
    return f"{_USAGE}\n\n{cli.describe_flags(values)}"


def parse_options(values: flags.FlagValues, *, in_terminal: bool) -> Options:
    """Options from flags.

    Args:
      values: the flags.
      in_terminal: whether a user can be talked to.

    Raises:
      ValueError: if a flag is not valid, or has no effect beside the others.
    """
    options = Options(
        prompts=tuple(values.prompt),
        prompts_file=values.prompts_file,
        output=values.output,
        chat=values.chat,
        system=values.system,
        stream=values.stream,
        timeline=values.timeline,
        params=cli.sampling_params(values, max_tokens=_MAX_TOKENS_CHAT if values.chat else _MAX_TOKENS),
        engine=cli.engine_options(values, max_waiting=None),  # the prompts are held anyway
    )
    if options.interactive and not (options.chat and options.stream and in_terminal):
        raise ValueError(
            'there is nothing to do: give --prompt "some text" or --prompts_file FILE, or --chat --stream in a terminal'
        )
    if options.interactive and (options.params.n > 1 or not options.params.detokenize):
        raise ValueError("a conversation goes on from the text of one answer: leave out --n and --nodetokenize")
    if options.stream and options.output is not None:
        raise ValueError("--stream prints text and --output writes a file: use one of them")
    if options.system is not None and not options.chat:
        raise ValueError("--system is the system message of a chat: add --chat")
    if options.timeline is not None:
        check_path(options.timeline)
    for name in ("logprobs", "prompt_logprobs"):
        if values[name].value is not None and options.output is None:
            raise ValueError(f"--{name} is reported in JSON lines only: add --output FILE")
    return options


def main(argv: Sequence[str]) -> int:
    """Runs the command with the flags that absl has parsed; returns its exit status."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}: prompts are given with --prompt")
        options = parse_options(flags.FLAGS, in_terminal=sys.stdin is not None and sys.stdin.isatty())
        return run(options)
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


def run(options: Options, make_engine: Callable[[cli.EngineOptions], Any] = cli.make_engine) -> int:
    """Does what the options ask for; returns the exit status.

    Raises:
      ValueError: if there is nothing to do, or a file or the model is not there or not valid.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if options.interactive:
        return _chat(options, make_engine(options.engine))
    entries = list(_entries(options))
    _check_entries(entries, options)
    if options.output is None:
        sink = StreamPrinter(entries) if options.stream else TextPrinter(entries)
        return _serve(entries, sink, options, make_engine)
    with ResultsFile(options.output) as file:
        status = _serve(entries, JsonWriter(file), options, make_engine)
        if status == _INTERRUPTED:
            print(f"finished results are in {file.partial_path}", file=sys.stderr)
            raise SystemExit(status)  # leaves the partial file where it is
        return status


def _chat(options: Options, engine: Any) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lets `input` edit lines)
    conversation = Conversation(engine, options.params, options.system)
    engine.warm_up()
    print("Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
    with recording(engine, options.timeline):
        converse(
            conversation,
            read=input,
            write=lambda text: print(text, end="", flush=True),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(engine.stats.summary(), file=sys.stderr)
    return 0


def _entries(options: Options) -> Iterator[Entry]:
    for index, prompt in enumerate(options.prompts):
        yield _as_chat(Request(id=f"prompt-{index + 1}", prompt=prompt, params=options.params), options)
    if options.prompts_file is not None:
        for entry in read_prompts(options.prompts_file, options.params):
            yield _as_chat(entry, options)


def _as_chat(entry: Entry, options: Options) -> Entry:
    """The entry as --chat and --system make it; token ids stay what they are."""
    if options.chat and isinstance(entry, Request) and entry.prompt is not None:
        entry = ChatRequest(entry, ({"role": "user", "content": entry.prompt},))
    if options.system is not None and isinstance(entry, ChatRequest):
        entry = entry.led_by(options.system)
    return entry


def _check_entries(entries: list[Entry], options: Options) -> None:
    if not entries:
        raise ValueError(f"{options.prompts_file!r} has no prompts: give one per line")
    ids = [entry.id for entry in entries]
    if len(set(ids)) < len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"id {repeated!r} is that of a --prompt and of a line of the file: change the line's")


def _serve(entries: list[Entry], sink: Sink, options: Options, make_engine: Callable[..., Any]) -> int:
    engine = make_engine(options.engine)
    num_bad = 0
    for entry in entries:
        error = entry.message if isinstance(entry, PromptError) else _add(engine, entry)
        if error is not None:
            num_bad += 1
            sink.refuse(entry.id, error)
    with recording(engine, options.timeline):
        status = _work(engine, sink, options, num_bad, len(entries))
    if status == _INTERRUPTED:
        print(f"interrupted: {engine.stats.num_requests} of {len(entries)} requests finished", file=sys.stderr)
    print(engine.stats.summary(), file=sys.stderr)
    return status


def _work(engine: Any, sink: Sink, options: Options, num_bad: int, num_entries: int) -> int:
    """Works until all is done or interrupted; returns the exit status."""
    status = 1 if num_bad else 0
    try:
        if engine.has_unfinished:
            engine.warm_up()
        with _Progress(0 if options.stream else num_entries - num_bad) as advance:
            while engine.has_unfinished:
                for update in engine.step(_STREAM_STEPS if options.stream else None):
                    sink.take(update)
                    if update.output is not None and update.output.error is not None:
                        print(f"error: {update.request_id}: {update.output.error}", file=sys.stderr)
                        status = 1
                    advance(update.output is not None)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    sink.end()
    return status


def _add(engine: Any, entry: Request | ChatRequest) -> str | None:
    """Hands a request to the engine; returns why it was refused, if it was."""
    try:
        engine.add_request(entry.render(engine.tokenizer) if isinstance(entry, ChatRequest) else entry)
    except (ValueError, QueueFullError) as error:
        return str(error)
    return None


class _Progress:
    """A bar that counts finished requests, on a terminal and if there are several."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Callable[[bool], None]:
        if sys.stderr.isatty() and self._total > 1:
            import tqdm

            self._bar = tqdm.tqdm(total=self._total, unit="request", file=sys.stderr)
        return lambda finished: self._bar.update(1) if finished and self._bar is not None else None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def entry_point() -> None:
    """Defines the flags and runs `main` under absl."""
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=lambda argv: cli.parse_flags(argv, flags.FLAGS, lambda: help_text(flags.FLAGS)))


if __name__ == "__main__":
    entry_point()
