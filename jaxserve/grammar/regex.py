"""Regular expressions over text as deterministic automata over its UTF-8 bytes.

    pattern --parse--> syntax tree --Thompson--> NFA --subset construction--> DFA --Hopcroft--> the smallest DFA

The syntax is a part of Python's, with the meaning that `re.fullmatch(pattern, text, re.ASCII)` gives it: literals, escapes,
classes, `.`, groups, `|`, and the quantifiers `*`, `+`, `?`, `{m}`, `{m,}`, `{,n}`, `{m,n}`. What an automaton cannot do
(back references, looking around) and what is left out (anchors, flags) is refused by name.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int32

_MAX_NFA_STATES = 100_000
_MAX_DFA_STATES = 10_000
_MAX_NESTING = 50

_Ranges = tuple[tuple[int, int], ...]  # of code points or bytes, both ends included
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)  # not characters: UTF-8 has no bytes for them
_DIGIT: _Ranges = ((0x30, 0x39),)
_WORD: _Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_BLANK: _Ranges = ((0x09, 0x0D), (0x20, 0x20))
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclasses.dataclass(frozen=True)
class ByteAutomaton:
    """A DFA over bytes; it starts in state 0, and from every state some text leads to an accepting one."""

    successor: Int32[np.ndarray, "N 256"]  # -1: no text goes on like that
    accepting: Bool[np.ndarray, " N"]


def compile_regex(pattern: str) -> ByteAutomaton:
    """The smallest automaton that accepts the texts which the whole pattern matches.

    Raises:
      ValueError: if the pattern is malformed, uses what is not supported, matches no text, or needs too many states.
    """
    nfa = _Nfa(pattern)
    end = nfa.add(_Parser(pattern).parse(), 0)
    moves, accepting, classes = _determinise(nfa, end, pattern)
    block_of = _equivalent(moves, accepting)
    order: dict[int, int] = {}  # block: its number, by breadth-first search
    dead, waiting = block_of[-1], collections.deque([0])
    if block_of[0] == dead:
        raise ValueError(f"regular expression {pattern!r} matches no text: nothing could be generated")
    order[block_of[0]] = 0
    rows: list[list[int]] = []
    accepts: list[bool] = []
    while waiting:
        state = waiting.popleft()
        accepts.append(state in accepting)
        rows.append([])
        for target in moves[state]:
            block = block_of[target]
            if block != dead and block not in order:
                order[block] = len(order)
                waiting.append(target)
            rows[-1].append(-1 if block == dead else order[block])
    return ByteAutomaton(np.asarray(rows, np.int32)[:, classes], np.asarray(accepts))


@dataclasses.dataclass(frozen=True)
class _Chars:
    ranges: _Ranges


@dataclasses.dataclass(frozen=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclasses.dataclass(frozen=True)
class _Choice:
    branches: tuple["_Node", ...]


@dataclasses.dataclass(frozen=True)
class _Repeat:
    part: "_Node"
    least: int
    most: int | None  # None: no limit


_Node = _Chars | _Sequence | _Choice | _Repeat


class _Parser:
    """Recursive descent."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._position < len(self._pattern):
            raise self._error("')' closes no group: write \\) for the character")
        return node

    def _error(self, what: str) -> ValueError:
        return ValueError(f"regular expression {self._pattern!r}, position {self._position}: {what}")

    def _peek(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _accept(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._position)
        self._position += len(text) * found
        return found

    def _next(self, what: str) -> str:
        if self._position == len(self._pattern):
            raise self._error(f"the pattern ends within {what}")
        self._position += 1
        return self._pattern[self._position - 1]

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._accept("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return _Sequence(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
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
        return _Repeat(node, least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._accept(sign):
                return bounds
        found = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}").match(self._pattern, self._position)
        if found is None or found[0] == "{}":
            return None  # as in Python, a brace that is no quantifier is a character
        self._position = found.end()
        least, comma, most = found.groups()
        if not comma:
            return int(least), int(least)
        return int(least or 0), int(most) if most else None

    def _atom(self) -> _Node:
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
            return _Chars(self._escape())
        if character == ".":
            return _Chars(_complement(((0x0A, 0x0A),)))
        return _Chars(((ord(character), ord(character)),))

    def _group(self) -> _Node:
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

    def _class(self) -> _Node:
        negated = self._accept("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or self._peek() != "]":
            first = False
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
        return _Chars(_complement(tuple(ranges)) if negated else tuple(ranges))

    def _member(self) -> _Ranges:
        character = self._next("[...]")
        if character != "\\":
            return ((ord(character), ord(character)),)
        if self._accept("b"):
            return ((8, 8),)
        return self._escape()

    def _escape(self) -> _Ranges:
        character = self._next("an escape")
        classes = {"d": _DIGIT, "w": _WORD, "s": _BLANK}
        if character.lower() in classes:
            ranges = classes[character.lower()]
            return ranges if character.islower() else _complement(ranges)
        if character in _HEX_DIGITS:
            digits = self._pattern[self._position : self._position + _HEX_DIGITS[character]]
            self._position += len(digits)
            if not re.fullmatch(f"[0-9A-Fa-f]{{{_HEX_DIGITS[character]}}}", digits) or int(digits, 16) > _LAST:
                raise self._error(f"\\{character} needs {_HEX_DIGITS[character]} hexadecimal digits of a character")
            return ((int(digits, 16), int(digits, 16)),)
        if character in _CONTROLS:
            character = _CONTROLS[character]
        elif character.isascii() and character.isalnum():
            raise self._error(
                f"\\{character} is not supported: of letters, \\d \\w \\s \\n \\t \\r \\f \\v \\a \\x \\u are"
            )
        return ((ord(character), ord(character)),)


class _Nfa:
    """Thompson's construction. State 0 is the start."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.edges: list[list[tuple[int, int, int]]] = [[]]  # per state: first byte, last byte, target
        self.empty: list[list[int]] = [[]]  # per state: targets that need no byte

    def new_state(self) -> int:
        if len(self.edges) == _MAX_NFA_STATES:
            raise ValueError(
                f"regular expression {self._pattern!r} needs more than {_MAX_NFA_STATES} states: "
                "use smaller numbers in {...}, or * for them"
            )
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def add(self, node: _Node, start: int) -> int:
        """Adds paths for `node` that begin in `start`; returns the state in which they end."""
        if isinstance(node, _Sequence):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, _Repeat):
            return self._repeat(node, start)
        end = self.new_state()
        if isinstance(node, _Choice):
            for branch in node.branches:
                self.empty[start].append(begin := self.new_state())
                self.empty[self.add(branch, begin)].append(end)
            return end
        for low, high in node.ranges:
            for *first, last in _utf8_ranges(low, high):
                state = start
                for bounds in first:
                    self.edges[state].append((*bounds, following := self.new_state()))
                    state = following
                self.edges[state].append((*last, end))
        return end

    def _repeat(self, node: _Repeat, start: int) -> int:
        for _ in range(node.least):
            start = self.add(node.part, start)
        end = self.new_state()
        if node.most is None:
            self.empty[start].append(begin := self.new_state())
            self.empty[self.add(node.part, begin)].append(begin)
            self.empty[begin].append(end)
            return end
        for _ in range(node.most - node.least):
            self.empty[start].append(end)
            self.empty[start].append(begin := self.new_state())
            start = self.add(node.part, begin)
        self.empty[start].append(end)
        return end

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """All states that need no further byte, without those that only lead to others."""
        found, waiting = set(states), list(states)
        while waiting:
            new = [target for target in self.empty[waiting.pop()] if target not in found]
            found.update(new)
            waiting += new
        return frozenset(state for state in found if self.edges[state] or not self.empty[state])


def _determinise(nfa: _Nfa, end: int, pattern: str) -> tuple[list[list[int]], set[int], Int32[np.ndarray, " 256"]]:
    """Successors by class of bytes, accepting states, the class of each byte; the last state is the dead one."""
    edges = [edge for edges in nfa.edges for edge in edges]
    firsts = sorted({0, *(low for low, _, _ in edges), *(high + 1 for _, high, _ in edges)} - {256})
    classes = np.searchsorted(firsts, np.arange(256), side="right").astype(np.int32) - 1
    start = nfa.closure([0])
    numbers, waiting = {start: 0}, collections.deque([start])
    moves: list[list[int]] = []
    while waiting:
        targets: list[set[int]] = [set() for _ in firsts]
        for state in waiting.popleft():
            for low, high, target in nfa.edges[state]:
                for index in range(classes[low], classes[high] + 1):
                    targets[index].add(target)
        moves.append([])
        for target in map(frozenset, targets):
            following = nfa.closure(target)
            if following and following not in numbers:
                numbers[following] = len(numbers)
                waiting.append(following)
            moves[-1].append(numbers.get(following, -1))
        if len(numbers) > _MAX_DFA_STATES:
            raise ValueError(
                f"regular expression {pattern!r} needs more than {_MAX_DFA_STATES} states: "
                "use smaller numbers in {...}, or * for them"
            )
    dead = len(moves)
    moves = [[dead if target < 0 else target for target in row] for row in [*moves, [dead] * len(firsts)]]
    return moves, {number for states, number in numbers.items() if end in states}, classes


def _equivalent(moves: list[list[int]], accepting: set[int]) -> list[int]:
    """The block of equivalent states that each state is in (Hopcroft, 1971)."""
    before: list[dict[int, list[int]]] = [collections.defaultdict(list) for _ in moves[0]]
    for state, row in enumerate(moves):
        for sources, target in zip(before, row, strict=True):
            sources[target].append(state)
    block_of = [int(state in accepting) for state in range(len(moves))]
    blocks = [{state for state, block in enumerate(block_of) if block == index} for index in range(2)]
    waiting = {0, 1}
    while waiting:
        splitter = list(blocks[waiting.pop()])
        for sources in before:
            touched: dict[int, set[int]] = collections.defaultdict(set)
            for target in splitter:
                for state in sources.get(target, ()):
                    touched[block_of[state]].add(state)
            for block, part in touched.items():
                if len(part) == len(blocks[block]):
                    continue
                blocks[block] -= part
                for state in part:
                    block_of[state] = len(blocks)
                smaller = len(blocks) if block in waiting or len(part) <= len(blocks[block]) else block
                blocks.append(part)
                waiting.add(smaller)
    return block_of


def _complement(ranges: _Ranges) -> _Ranges:
    kept, first = [], 0
    for low, high in sorted(ranges):
        if low > first:
            kept.append((first, low - 1))
        first = max(first, high + 1)
    return (*kept, (first, _LAST)) if first <= _LAST else tuple(kept)


def _utf8_ranges(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences of byte ranges that are together the UTF-8 of the characters from `low` to `high`.

    U+0000 to U+07FF = [00-7F] and [C2-DF][80-BF]
    """
    edges = (0x7F, 0x7FF, _SURROGATES[0] - 1, _SURROGATES[1], 0xFFFF)  # where the number of bytes changes, and around
    for edge in edges:
        if low <= edge < high:
            yield from _utf8_ranges(low, edge)
            yield from _utf8_ranges(edge + 1, high)
            return
    if _SURROGATES[0] <= low <= _SURROGATES[1]:
        return
    for shift in (6, 12, 18):  # bytes after the first that differ must be free to take all values
        mask = (1 << shift) - 1
        if low > 0x7F and low >> shift != high >> shift:
            if low & mask:
                yield from _utf8_ranges(low, low | mask)
                yield from _utf8_ranges((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from _utf8_ranges(low, (high & ~mask) - 1)
                yield from _utf8_ranges(high & ~mask, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))
