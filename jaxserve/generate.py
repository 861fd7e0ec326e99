"""The command line that generates text for prompts.

    python -m jaxserve.generate --prompt "def fibonacci(n):" --temperature 0
    python -m jaxserve.generate --prompts_file prompts.jsonl --output results.jsonl
    python -m jaxserve.generate --model Qwen/Qwen3-0.6B --chat --stream

Results go to stdout, or as JSON lines to the file that --output names; a summary goes to stderr. The exit status is 0 on
success, 1 after an error (a bad line of a prompts file counts as one, although the other lines are served), and 130 after
Ctrl-C, when the results of all requests that had finished are kept.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from jaxserve.commands.flags import parse_flags
from jaxserve.commands.options import INTERRUPTED, define_flags, help_text, parse_options


def main(argv: Sequence[str]) -> int:
    """Runs the command with the flags that absl has parsed; returns its exit status."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}: give prompts with --prompt")
        options = parse_options(flags.FLAGS, in_terminal=sys.stdin is not None and sys.stdin.isatty())
        # This import brings JAX, which takes longer than all of --help; so it comes after the flags.
        from jaxserve.commands.generation import run

        return run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone, so there is no one to report to
        return 1
    except (OSError, MemoryError, OverflowError, RuntimeError) as error:
        sentence = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"error: {sentence} (if memory ran out: lower --num_pages, --max_slots or --max_queue)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def entry_point() -> None:
    """Defines the flags and runs `main` under absl."""
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=lambda argv: parse_flags(argv, flags.FLAGS, lambda: help_text(flags.FLAGS)))


if __name__ == "__main__":
    entry_point()
