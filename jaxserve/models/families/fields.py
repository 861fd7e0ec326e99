"""Reads of typed fields from a JSON object. Errors name the field, its value and what it must be."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of value: a test, and the words that an error uses for it."""

    accepts: Callable[[Any], bool]
    words: str


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """Returns the value as errors show it, shortened."""
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
    """Returns the value of `key`: `default` if the key is absent, None if its value is null.

    Raises:
      ValueError: if the value is neither null nor of that kind.
    """
    value = mapping.get(key, default)
    if value is None or kind.accepts(value):
        return value
    raise ValueError(f"{key}={short(value)} must be {kind.words}")


def require(mapping: Mapping[str, Any], key: str, kind: Kind) -> Any:
    """Does what `read` does, and raises ValueError if the field is absent or null."""
    value = read(mapping, key, kind)
    if value is None:
        raise ValueError(f"{key} is missing: add it, {kind.words}")
    return value
