"""Stop strings in text that comes piece by piece: what is given out is never taken back."""

from collections.abc import Sequence


class StopScanner:
    """Looks for the first stop string to be completed, and holds back text that could be the beginning of one.

    Of strings that are completed by the same character, the first in the list counts. What is held back is never more than
    one character less than the longest stop string.

    Attributes:
      matched: the stop string that was found; None so far. Nothing is given out after it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Args:
        stops: not empty strings.
        include: whether the text ends with the stop string; else before it.
        """
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._held = ""  # not given out
        self._num_exempt = 0  # characters of `_held` at which no stop string may end

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Takes the next piece; returns the text that is final by now.

        Args:
          text: what comes next.
          may_stop: whether a stop string may end within this piece. One that begins here may end later.
        """
        if self.matched is not None:
            return ""
        self._held += text
        if not may_stop:
            self._num_exempt = len(self._held)
        found = [(end, order) for order, stop in enumerate(self._stops) if (end := self._find_end(stop)) is not None]
        if found:
            end, order = min(found)
            self.matched = self._stops[order]
            return self._held[: end if self._include else end - len(self.matched)]
        num_held = max((self._num_begun(stop) for stop in self._stops), default=0)
        return self._give(len(self._held) - num_held)

    def flush(self) -> str:
        """Ends the text; returns what was held back."""
        return "" if self.matched is not None else self._give(len(self._held))

    def _give(self, number: int) -> str:
        final, self._held = self._held[:number], self._held[number:]
        self._num_exempt = max(self._num_exempt - number, 0)
        return final

    def _find_end(self, stop: str) -> int | None:
        """Where the first occurrence that counts ends."""
        start = max(self._num_exempt - len(stop) + 1, 0)
        index = self._held.find(stop, start)
        return None if index < 0 else index + len(stop)

    def _num_begun(self, stop: str) -> int:
        """Characters at the end of what is held that are the beginning of the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
