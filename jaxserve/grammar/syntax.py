"""Regular expressions as syntax trees.

The syntax is a part of Python's, with the meaning that `re.fullmatch(pattern, text, re.ASCII)` gives it: literals, escapes,
classes, `.`, groups, `|`, and the quantifiers `*`, `+`, `?`, `{m}`, `{m,}`, `{,n}`, `{m,n}`. What an automaton cannot do
(back references, looking around) and what is left out (anchors, flags) is refused by name.
"""

import dataclasses
import re

from jaxserve.grammar.budget import Budget, shown

Ranges = tuple[tuple[int, int], ...]  # ranges of code points, both ends included
LAST_CHARACTER = 0x10FFFF

_MAX_NESTING = 50
_MAX_DIGITS = 9  # digits of a number in {...}; a longer number would exceed any budget
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_BLANK: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclasses.dataclass(frozen=True)
class Chars:
    """One character of these ranges."""

    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Parts that follow each other."""

    parts: tuple["Node", ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several branches."""

    branches: tuple["Node", ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """A part that occurs several times in a row."""

    part: "Node"
    least: int
    most: int | None  # None: no limit


Node = Chars | Sequence | Choice | Repeat


def parse(pattern: str, budget: Budget) -> Node:
    """Returns the syntax tree of a pattern.

    Raises:
      ValueError: if the pattern is malformed, uses what is not supported, or exceeds the budget.
    """
    return _Parser(pattern, budget).parse()


class _Parser:
    """A parser by recursive descent."""

    def __init__(self, pattern: str, budget: Budget) -> None:
        self._pattern = pattern
        self._budget = budget
        self._position = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._choice()
        if self._position < len(self._pattern):
            raise self._error("')' closes no group: write \\) for the character")
        return node

    def _error(self, what: str) -> ValueError:
        return ValueError(f"regular expression {shown(self._pattern)}, position {self._position}: {what}")

    def _peek(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _accept(self, text: str) -> bool:
        is_next = self._pattern.startswith(text, self._position)
        self._position += len(text) * is_next
        return is_next

    def _next(self, what: str) -> str:
        if self._position == len(self._pattern):
            raise self._error(f"the pattern ends within {what}")
        self._position += 1
        return self._pattern[self._position - 1]

    def _choice(self) -> Node:
        branches = [self._sequence()]
        while self._accept("|"):
            self._budget.spend(1)
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            self._budget.spend(1)
            parts.append(self._quantified(self._atom()))
        return Sequence(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        bounds = self._quantifier()
        if bounds is None:
            return node
        least, most = bounds
        if most is not None and most < least:
            raise self._error(f"{{{least},{most}}} allows no number of repetitions: put the smaller one first")
        if self._peek() in ("?", "+"):
            raise self._error(
                f"{self._peek()!r} after a quantifier is not supported: leave it out (lazy ones match the same texts)"
            )
        if self._quantifier() is not None:
            raise self._error("a quantifier follows a quantifier: put the inner one into a group (?:...)")
        return Repeat(node, least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._accept(sign):
                return bounds
        match = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}").match(self._pattern, self._position)
        if match is None or match[0] == "{}":
            return None  # as in Python, a brace that is no quantifier is a character
        self._position = match.end()
        least, comma, most = match.groups()
        if max(len(least.lstrip("0")), len(most.lstrip("0"))) > _MAX_DIGITS:
            raise self._budget.error()
        if not comma:
            return int(least), int(least)
        return int(least or 0), int(most) if most else None

    def _atom(self) -> Node:
        character = self._peek()
        if character in "^$":
            raise self._error(f"{character!r} is not supported: leave it out, the whole text is matched anyway")
        if character in "*+?":
            raise self._error(f"{character!r} has nothing to repeat: write \\{character} for the character")
        self._position += 1
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return Chars(self._escape())
        if character == ".":
            return Chars(_complement(((0x0A, 0x0A),)))
        return Chars(((ord(character), ord(character)),))

    def _group(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"more than {_MAX_NESTING} groups within each other: flatten the expression")
        if self._accept("?"):
            named = re.compile(r"P<[A-Za-z_][A-Za-z_0-9]*>|:").match(self._pattern, self._position)
            if named is None:
                raise self._error(
                    "of groups with '(?' only (?:...) and (?P<name>...) are supported: no flags, no looking around, "
                    "no back references"
                )
            self._position = named.end()
        node = self._choice()
        if not self._accept(")"):
            raise self._error("a group has no ')'")
        self._depth -= 1
        return node

    def _class(self) -> Node:
        negated = self._accept("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            self._budget.spend(1)
            low = self._member()
            if not (self._peek() == "-" and self._pattern[self._position + 1 : self._position + 2] not in ("", "]")):
                ranges += low
                continue
            self._position += 1
            high = self._member()
            ends = [bounds[0][0] for bounds in (low, high) if len(bounds) == 1 and bounds[0][0] == bounds[0][1]]
            if len(ends) < 2 or ends[0] > ends[1]:
                raise self._error("a range in [...] must go from a character to a later one: write \\- for the sign")
            ranges.append((ends[0], ends[1]))
        self._position += 1
        return Chars(_complement(tuple(ranges)) if negated else tuple(ranges))

    def _member(self) -> Ranges:
        character = self._next("[...]")
        if character != "\\":
            return ((ord(character), ord(character)),)
        if self._accept("b"):
            return ((8, 8),)
        return self._escape()

    def _escape(self) -> Ranges:
        character = self._next("an escape")
        classes = {"d": _DIGIT, "w": _WORD, "s": _BLANK}
        if character.lower() in classes:
            ranges = classes[character.lower()]
            return ranges if character.islower() else _complement(ranges)
        if character in _HEX_DIGITS:
            digits = self._pattern[self._position : self._position + _HEX_DIGITS[character]]
            self._position += len(digits)
            if not re.fullmatch(f"[0-9A-Fa-f]{{{_HEX_DIGITS[character]}}}", digits) or int(digits, 16) > LAST_CHARACTER:
                raise self._error(f"\\{character} needs {_HEX_DIGITS[character]} hexadecimal digits of a character")
            return ((int(digits, 16), int(digits, 16)),)
        if character in _CONTROLS:
            character = _CONTROLS[character]
        elif character.isascii() and character.isalnum():
            raise self._error(
                f"\\{character} is not supported: of letters, \\d \\w \\s \\n \\t \\r \\f \\v \\a \\x \\u are"
            )
        return ((ord(character), ord(character)),)


def _complement(ranges: Ranges) -> Ranges:
    """Returns the ranges of all other characters."""
    gaps, first = [], 0
    for low, high in sorted(ranges):
        if low > first:
            gaps.append((first, low - 1))
        first = max(first, high + 1)
    return (*gaps, (first, LAST_CHARACTER)) if first <= LAST_CHARACTER else tuple(gaps)
