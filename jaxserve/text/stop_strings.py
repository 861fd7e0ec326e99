"""Stop strings in text that comes piece by piece. Text that was returned is final."""

from collections.abc import Sequence


class StopScanner:
    """A scanner for the stop string that is completed first; it holds back text that may be the beginning of one.

    If one character completes several stop strings, the first in the list counts. The scanner holds back fewer characters than
    the longest stop string has.

    Attributes:
      matched: the stop string in the text, after which no text is returned; None if there is none so far.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Starts before the first piece.

        Args:
          stops: the stop strings, none of them empty.
          include: whether the text includes the stop string that ends it.
        """
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._held = ""  # the text that was not returned yet
        self._num_exempt = 0  # characters of `_held` at which no stop string may end

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Takes the next piece of text; returns the text that has become final.

        Args:
          text: the piece.
          may_stop: whether a stop string may end within this piece; one that begins in it may end later in any case.
        """
        if self.matched is not None:
            return ""
        self._held += text
        if not may_stop:
            self._num_exempt = len(self._held)
        ends = [(end, order) for order, stop in enumerate(self._stops) if (end := self._find_end(stop)) is not None]
        if ends:
            end, order = min(ends)
            self.matched = self._stops[order]
            return self._held[: end if self._include else end - len(self.matched)]
        num_held = max((self._num_started(stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - num_held)

    def flush(self) -> str:
        """Ends the text; returns the text that was held back."""
        return "" if self.matched is not None else self._release(len(self._held))

    def _release(self, number: int) -> str:
        final, self._held = self._held[:number], self._held[number:]
        self._num_exempt = max(self._num_exempt - number, 0)
        return final

    def _find_end(self, stop: str) -> int | None:
        """Returns where the first occurrence that counts ends, or None."""
        start = max(self._num_exempt - len(stop) + 1, 0)
        index = self._held.find(stop, start)
        return None if index < 0 else index + len(stop)

    def _num_started(self, stop: str) -> int:
        """Returns how many characters at the end of the held text are the beginning of the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
