"""The tables that benchmarks print, and the format of their numbers."""

from collections.abc import Mapping
from typing import Any


class Table:
    """A table on stdout that grows row by row; making it prints the headings.

    Args:
      columns: width of each column by its heading; a column is never narrower than its heading.
    """

    def __init__(self, columns: Mapping[str, int]) -> None:
        self._columns = {name: max(width, len(name)) for name, width in columns.items()}
        self.print_row({name: name for name in columns})

    def print_row(self, cells: Mapping[str, Any]) -> None:
        """Prints one row.

        Args:
          cells: values by heading. Numbers are written as `number` does; a value that is None or missing leaves its cell
            empty, and a value without a column is not printed.
        """
        texts = (_text(cells.get(name)).rjust(width) for name, width in self._columns.items())
        print("  ".join(texts).rstrip(), flush=True)


def number(value: float) -> str:
    """Writes a number with three digits, and a number above 1000 as an integer."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None, digits: int = 0) -> str:
    """Writes a share as a percentage; nothing if it is None."""
    return "" if share is None else f"{100 * share:.{digits}f}%"


def factor(ratio: float | None) -> str:
    """Writes a ratio as a factor such as "1.50x"; nothing if it is None."""
    return "" if ratio is None else f"{ratio:.2f}x"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)
