"""What the engine's benchmarks share as commands: lists in flags, errors as sentences, tables, percentiles."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lib.report import Record, rounded

PERCENTILES = {"median": 50, "p90": 90, "p99": 99}


def run_command(argv: Sequence[str], work: Callable[[], int]) -> int:
    """Does the work and returns its exit status; 1 after an error, which is told in one sentence, 130 after Ctrl-C."""
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
    """Of its message; its name if there is none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def integers(flag: str, given: Sequence[str], low: int = 1) -> tuple[int, ...]:
    """The numbers of a list flag, each once.

    Raises:
      ValueError: if one is no integer or too low, or there is none.
    """
    for text in given:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**31:
            raise ValueError(f"--{flag}: {text!r} must be an integer from {low} to {2**31 - 1}")
    return _some(flag, tuple(dict.fromkeys(map(int, given))))


def positive(flag: str, given: Sequence[str]) -> tuple[float, ...]:
    """As `integers`, for numbers above 0."""
    found = []
    for text in given:
        try:
            found.append(float(text))
        except ValueError:
            found.append(-1.0)
        if not 0 < found[-1] < float("inf"):
            raise ValueError(f"--{flag}: {text!r} must be a number above 0")
    return _some(flag, tuple(dict.fromkeys(found)))


def names(flag: str, given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """As `integers`, for names out of `known`; "all" means all of them."""
    if list(given) == ["all"]:
        return tuple(known)
    for name in given:
        if name not in known:
            raise ValueError(f"--{flag}: {name!r} is unknown: use {', '.join(known)}, or all")
    return _some(flag, tuple(dict.fromkeys(given)))


def _some(flag: str, values: Any) -> Any:
    if not values:
        raise ValueError(f"--{flag} is empty: give at least one value")
    return values


def spread(samples: Sequence[float]) -> Record:
    """Mean and percentiles of samples; None each if there are none."""
    if not len(samples):
        return dict.fromkeys(("mean", *PERCENTILES))
    percentiles = np.percentile(samples, list(PERCENTILES.values()))
    values = dict(zip(PERCENTILES, map(float, percentiles), strict=True))
    return {name: rounded(value) for name, value in {"mean": float(np.mean(samples)), **values}.items()}


class Table:
    """A table on stdout that grows row by row.

    Args:
      columns: heading -> width.
    """

    def __init__(self, columns: Mapping[str, int]) -> None:
        self._columns = {name: max(width, len(name)) for name, width in columns.items()}
        self.row({name: name for name in columns})

    def row(self, cells: Mapping[str, Any]) -> None:
        """Prints a row; numbers with three digits, what is None or missing as nothing."""
        texts = (_text(cells.get(name)).rjust(width) for name, width in self._columns.items())
        print("  ".join(texts).rstrip(), flush=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
