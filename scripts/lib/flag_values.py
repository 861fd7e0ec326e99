"""Reads flag values: lists of numbers and names, and records whose fields are flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags

Options = TypeVar("Options")


def integers(flag: str, texts: Sequence[str], low: int = 1) -> tuple[int, ...]:
    """Returns the integers of a list flag, without repetitions.

    Args:
      flag: name of the flag, for errors.
      texts: items of the list.
      low: lowest integer that is allowed.

    Raises:
      ValueError: if an item is not an integer from `low` to 2^31 - 1, or the list is empty.
    """
    for text in texts:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**31:
            raise ValueError(f"--{flag}: {text!r} must be an integer from {low} to {2**31 - 1}")
    return _distinct(flag, map(int, texts))


def positive_numbers(flag: str, texts: Sequence[str]) -> tuple[float, ...]:
    """Returns the numbers of a list flag, without repetitions.

    Raises:
      ValueError: if an item is not a finite number above 0, or the list is empty.
    """
    return _distinct(flag, [_positive(flag, text) for text in texts])


def names(flag: str, texts: Sequence[str], choices: Sequence[str], *, all_allowed: bool = True) -> tuple[str, ...]:
    """Returns the names of a list flag, without repetitions.

    Args:
      flag: name of the flag, for errors.
      texts: items of the list.
      choices: the names that are allowed.
      all_allowed: True if the single item "all" stands for every choice.

    Raises:
      ValueError: if an item is not among the choices, or the list is empty.
    """
    if all_allowed and list(texts) == ["all"]:
        return tuple(choices)
    for name in texts:
        if name not in choices:
            or_all = ", or all" if all_allowed else ""
            raise ValueError(f"--{flag}: {name!r} is unknown: use {', '.join(choices)}{or_all}")
    return _distinct(flag, texts)


def options_from_flags(options: type[Options], values: flags.FlagValues, **checked: Any) -> Options:
    """Makes a command's record of options: the fields in `checked` as given, all others from the flags of their names."""
    fields: Any = options
    unchecked = (field.name for field in dataclasses.fields(fields) if field.name not in checked)
    return options(**checked, **{name: values[name].value for name in unchecked})


def _positive(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError(f"--{flag}: {text!r} must be a number above 0")
    return number


def _distinct(flag: str, items: Any) -> Any:
    distinct = tuple(dict.fromkeys(items))
    if not distinct:
        raise ValueError(f"--{flag} is empty: give at least one value")
    return distinct
