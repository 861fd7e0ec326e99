"""The work of `python -m jaxserve.generate`: it serves all prompts, or holds a conversation in the terminal."""

import sys
from collections.abc import Callable, Sequence

from jaxserve.commands.chat import chat_in_terminal
from jaxserve.commands.entries import read_entries
from jaxserve.commands.flags import EngineOptions
from jaxserve.commands.make_engine import make_engine
from jaxserve.commands.options import INTERRUPTED, Options
from jaxserve.commands.printers import JsonWriter, Sink, StreamPrinter, TextPrinter
from jaxserve.commands.progress import Progress
from jaxserve.commands.prompts import ChatRequest, Entry, PromptError
from jaxserve.commands.results_file import ResultsFile
from jaxserve.engine import Engine, QueueFullError
from jaxserve.request import Request
from jaxserve.timeline import recording

_STREAM_STEPS = 1  # steps per call while text is streamed


def run(options: Options, make_engine: Callable[[EngineOptions], Engine] = make_engine) -> int:
    """Carries out the options; returns the exit status.

    Raises:
      ValueError: if a file or the model is missing or not valid.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if options.interactive:
        chat_in_terminal(make_engine(options.engine), options.params, options.system, options.timeline)
        return 0
    entries = read_entries(options)
    if options.output is None:
        sink = StreamPrinter(entries) if options.stream else TextPrinter(entries)
        return _serve(entries, sink, options, make_engine)
    with ResultsFile(options.output) as file:
        try:
            status = _serve(entries, JsonWriter(file), options, make_engine)
        except KeyboardInterrupt:  # before the engine could start
            status = INTERRUPTED
        if status == INTERRUPTED:
            file.leave_partial()
            where = f"are in {str(file.partial_path)!r}" if file.num_records else "do not exist: none was written"
            print(f"interrupted: the results so far {where}", file=sys.stderr)
    return status


def _serve(
    entries: Sequence[Entry], sink: Sink, options: Options, make_engine: Callable[[EngineOptions], Engine]
) -> int:
    """Serves all entries; returns the exit status."""
    engine = make_engine(options.engine)
    num_refused = 0
    for entry in entries:
        error = entry.message if isinstance(entry, PromptError) else _add(engine, entry)
        if error is not None:
            num_refused += 1
            sink.refuse(entry.id, error)
    with recording(engine, options.timeline):
        status = _step_until_done(engine, sink, options, len(entries) - num_refused)
    if status == INTERRUPTED:
        print(f"interrupted: {engine.stats.num_requests} of {len(entries)} requests finished", file=sys.stderr)
    print(engine.stats.summary(), file=sys.stderr)
    return 1 if status == 0 and num_refused else status


def _step_until_done(engine: Engine, sink: Sink, options: Options, num_requests: int) -> int:
    """Runs the engine until every request has finished, or until Ctrl-C; returns the exit status."""
    status = 0
    try:
        if engine.has_unfinished:
            engine.warm_up()
        with Progress(0 if options.stream else num_requests) as progress:
            while engine.has_unfinished:
                for update in engine.step(_STREAM_STEPS if options.stream else None):
                    sink.take(update)
                    if update.output is None:
                        continue
                    progress.advance()
                    if update.output.error is not None:
                        print(f"error: {update.request_id}: {update.output.error}", file=sys.stderr)
                        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED
    sink.end()
    return status


def _add(engine: Engine, entry: Request | ChatRequest) -> str | None:
    """Hands a request to the engine; returns the reason if it is refused."""
    try:
        engine.add_request(entry.render(engine.tokenizer) if isinstance(entry, ChatRequest) else entry)
    except (ValueError, QueueFullError) as error:
        return str(error)
    return None
