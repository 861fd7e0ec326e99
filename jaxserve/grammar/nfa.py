"""Syntax trees as nondeterministic automata over bytes (Thompson, 1968): characters become sequences of UTF-8 bytes."""

from collections.abc import Iterable, Iterator

from jaxserve.grammar.budget import Budget, shown
from jaxserve.grammar.syntax import Choice, Node, Repeat, Sequence

_MAX_STATES = 100_000
_SURROGATES = (0xD800, 0xDFFF)  # not characters: UTF-8 has no bytes for them


class Nfa:
    """An automaton that accepts the texts that a syntax tree describes.

    Attributes:
      edges: per state, (first byte, last byte, target).
      empty: per state, the targets that need no byte.
      end: the only accepting state; the automaton starts in state 0.
    """

    def __init__(self, node: Node, pattern: str, budget: Budget) -> None:
        """Expands the tree.

        Raises:
          ValueError: naming the pattern, if it needs too many states or exceeds the budget.
        """
        self._pattern = pattern
        self._budget = budget
        self.edges: list[list[tuple[int, int, int]]] = [[]]
        self.empty: list[list[int]] = [[]]
        self.end = self._add(node, 0)

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """Returns all states that can be reached without a byte, except those that only lead to others."""
        reached = set(states)
        waiting = list(reached)
        num_edges = 0
        while waiting:
            targets = self.empty[waiting.pop()]
            num_edges += len(targets)
            new = [target for target in targets if target not in reached]
            reached.update(new)
            waiting += new
        self._budget.spend(len(reached) + num_edges)
        return frozenset(state for state in reached if self.edges[state] or not self.empty[state])

    def _new_state(self) -> int:
        if len(self.edges) == _MAX_STATES:
            raise ValueError(
                f"regular expression {shown(self._pattern)} needs more than {_MAX_STATES} states: "
                "use smaller numbers in {...}, or * for them"
            )
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def _add(self, node: Node, start: int) -> int:
        """Adds paths for `node` that begin in `start`; returns the state in which they end."""
        self._budget.spend(1)
        if isinstance(node, Sequence):
            for part in node.parts:
                start = self._add(part, start)
            return start
        if isinstance(node, Repeat):
            return self._repeat(node, start)
        end = self._new_state()
        if isinstance(node, Choice):
            for branch in node.branches:
                self.empty[start].append(begin := self._new_state())
                self.empty[self._add(branch, begin)].append(end)
            return end
        for low, high in node.ranges:
            for *first, last in _utf8_ranges(low, high):
                self._budget.spend(1 + len(first))
                state = start
                for bounds in first:
                    self.edges[state].append((*bounds, following := self._new_state()))
                    state = following
                self.edges[state].append((*last, end))
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.least):
            start = self._add(node.part, start)
        end = self._new_state()
        if node.most is None:
            self.empty[start].append(begin := self._new_state())
            self.empty[self._add(node.part, begin)].append(begin)
            self.empty[begin].append(end)
            return end
        for _ in range(node.most - node.least):
            self.empty[start].append(end)
            self.empty[start].append(begin := self._new_state())
            start = self._add(node.part, begin)
        self.empty[start].append(end)
        return end


def _utf8_ranges(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Yields sequences of byte ranges that together are the UTF-8 of the characters from `low` to `high`.

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
