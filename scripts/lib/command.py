"""Runs a benchmark as a command: an error becomes one sentence and an exit status."""

import sys
from collections.abc import Callable, Sequence


def run_command(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Runs `work` and returns the exit status of the command.

    Args:
      argv: the command line without flags: the program's name, and further arguments, which are refused.
      work: the function that does everything else and returns an exit status.

    Returns:
      The exit status of `work`; 1 after an error, which is printed in one sentence; 130 after Ctrl-C.
    """
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}: this script takes flags only")
        return work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        print(f"error: {first_line(error)} (if memory ran out: lower slots, pages or lengths)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def first_line(error: Exception) -> str:
    """Returns the first line of the error's message, or the error's name if it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
