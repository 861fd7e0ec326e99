"""Typed reads of a JSON object's fields, with errors that name the field, its value and what it must be."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a field may hold: a test, and the words for it in an error."""

    accepts: Callable[[Any], bool]
    words: str


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """The value as an error shows it."""
    return _SHORT.repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SIZE = Kind(lambda value: _is_integer(value) and value >= 1, "an integer of at least 1")
COUNT = Kind(lambda value: _is_integer(value) and value >= 0, "an integer of at least 0")
POSITIVE = Kind(lambda value: _is_number(value) and value > 0, "a number above 0")
NON_NEGATIVE = Kind(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
NAME = Kind(lambda value: isinstance(value, str), "a string")
NAMES = Kind(lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of strings")
OBJECT = Kind(lambda value: isinstance(value, Mapping), "an object")


def read(mapping: Mapping[str, Any], key: str, kind: Kind, default: Any = None) -> Any:
    """The value of `key`; `default` where the key is absent; None where the value is null.

    Raises:
      ValueError: if the value is not of that kind.
    """
    value = mapping.get(key, default)
    if value is None or kind.accepts(value):
        return value
    raise ValueError(f"{key}={short(value)} must be {kind.words}")


def require(mapping: Mapping[str, Any], key: str, kind: Kind) -> Any:
    """`read` of a field that must be there."""
    value = read(mapping, key, kind)
    if value is None:
        raise ValueError(f"{key} is missing: add it, {kind.words}")
    return value
