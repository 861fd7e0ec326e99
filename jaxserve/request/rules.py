"""Rules for the values of a parameter. A rule takes the parameter's name and a value, and returns the value as it is stored.

It raises ValueError, with the name, the value and the rule in one sentence, if it does not accept the value.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_BIAS = 100.0
T = TypeVar("T")


class Rule(Protocol):
    """The values that a parameter accepts."""

    def __call__(self, name: str, value: Any) -> Any:
        """Returns the value as it is stored, or raises ValueError."""
        ...

    @property
    def range(self) -> str:
        """A sentence that says in which range numbers must lie; empty if there is nothing to say."""
        ...


@dataclasses.dataclass(frozen=True)
class Number:
    """A real number from `low` to `high`; if `above`, `low` itself is not accepted."""

    low: float
    high: float = _MAX_FLOAT32
    above: bool = False

    def __call__(self, name: str, value: object) -> float:
        rule = f"must be a number in {'(' if self.above else '['}{self.low}, {self.high}]"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name}={value!r} {rule}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        # The device has float32, where 1e-46 is 0.
        if not (self.includes(number) and self.includes(np.float32(number))):
            raise ValueError(f"{name}={value!r} {rule}")
        return number

    def includes(self, values: Any) -> Any:
        """Returns whether a number, or each number of an array, lies in the range."""
        return (values > self.low if self.above else values >= self.low) & (values <= self.high)

    @property
    def range(self) -> str:
        """The range in words."""
        if self.high == _MAX_FLOAT32:
            return f"{'Above' if self.above else 'At least'} {self.low}."
        return f"In {'(' if self.above else '['}{self.low}, {self.high}]."


@dataclasses.dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`, one of those in `also`, or None if `optional`."""

    low: int
    high: int = MAX_INT32
    optional: bool = False
    also: tuple[int, ...] = ()

    def __call__(self, name: str, value: object) -> int | None:
        if self.optional and value is None:
            return None
        if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) in self.also:
            return int(value)
        return check_int(name, value, self.low, self.high, "".join(f", or {number}" for number in self.also))

    def includes(self, values: Any) -> Any:
        """Returns whether an integer, or each integer of an array, lies in the range."""
        return (values >= self.low) & (values <= self.high)

    @property
    def range(self) -> str:
        """The range in words; empty where every count is accepted that the device can hold."""
        return "" if self.high == MAX_INT32 else f"From {self.low} to {self.high}."


@dataclasses.dataclass(frozen=True)
class Switch:
    """True or False."""

    range = ""

    def __call__(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some strings or integers, or None if `optional`."""

    values: tuple[str | int, ...]
    optional: bool = False

    range = ""

    def __call__(self, name: str, value: Any) -> str | int | None:
        if self.optional and value is None:
            return None
        if type(value) not in (str, int) or value not in self.values:
            null = ", or null" if self.optional else ""
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, self.values))}{null}")
        return value


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Token ids, stored as a tuple. If `optional`, None is accepted, each id is stored once, and there must be one."""

    optional: bool = False

    range = ""

    def __call__(self, name: str, value: object) -> tuple[int, ...] | None:
        if not self.optional:
            return check_ids(name, value)
        if value is None:
            return None
        ids = tuple(dict.fromkeys(check_ids(name, value)))
        if not ids:
            raise ValueError(f"{name}=[] leaves no token to draw: give some, or None for all")
        return ids


@dataclasses.dataclass(frozen=True)
class Biases:
    """A number per token id, clamped to [-100, 100]; stored as pairs in the order of the ids. JSON has ids as strings."""

    range = ""

    def __call__(self, name: str, value: object) -> tuple[tuple[int, float], ...]:
        entries: Any = () if value is None else value
        try:
            pairs: list[tuple[Any, Any]] = (
                list(entries.items()) if isinstance(entries, Mapping) else [(key, bias) for key, bias in entries]
            )
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r} must be a mapping from token ids to numbers") from None
        biases: dict[int, float] = {}
        for key, bias in pairs:
            token = check_int(f"{name} key", int(key) if isinstance(key, str) and key.isdecimal() else key, 0)
            if token in biases:
                raise ValueError(f"{name} has token id {token} twice")
            biases[token] = min(max(Number(-_MAX_FLOAT32)(f"{name}[{token}]", bias), -MAX_BIAS), MAX_BIAS)
        return tuple(sorted(biases.items()))


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, or lists of token ids, stored as a tuple. A single text counts as a list of one."""

    range = ""

    def __call__(self, name: str, value: object) -> tuple[str | tuple[int, ...], ...]:
        if value is None:
            return ()
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
            raise ValueError(f"{name}={value!r} must be a list of strings, or of lists of token ids")
        entries: list[str | tuple[int, ...]] = []
        for index, entry in enumerate(value):
            label = f"{name}[{index}]"
            if isinstance(entry, str):
                check_text(label, entry)
                entries.append(entry)
            else:
                entries.append(check_ids(label, entry))
            if not entries[-1]:
                raise ValueError(f"{label}={entry!r} must not be empty")
        return tuple(entries)


def check_int(name: str, value: object, low: int, high: int = MAX_INT32, alternative: str = "") -> int:
    """Returns a value of any integral type as an int; raises ValueError if it is no integer or outside of [low, high].

    The error ends with `alternative`, which names what else is accepted.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}{alternative}")
    return int(value)


def check_ids(name: str, value: object) -> tuple[int, ...]:
    """Returns token ids as a tuple; raises ValueError if the value is not a list of integers from 0 on."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of token ids")
    return tuple(check_int(f"{name}[{i}]", token, 0) for i, token in enumerate(value))


def check_text(name: str, value: object) -> None:
    """Raises ValueError if the value is not a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a surrogate pair at character {error.start}: it must be valid Unicode"
        ) from None
