"""A bound on the work of compiling a pattern, and so on its time and memory.

Work is counted, not timed: the same pattern is refused or accepted on every machine.
"""

MAX_WORK = 16_000_000  # a few seconds, a few hundred MB


class Budget:
    """The work that is left for one pattern. A unit is about one item that is added to a set."""

    def __init__(self, pattern: str, max_work: int) -> None:
        """Starts with `max_work` units; errors name the pattern."""
        self._pattern = pattern
        self._max_work = max_work
        self._num_left = max_work

    @property
    def num_spent(self) -> int:
        """The units spent so far."""
        return self._max_work - self._num_left

    def spend(self, work: int) -> None:
        """Takes units from the budget.

        Raises:
          ValueError: if fewer units are left.
        """
        self._num_left -= work
        if self._num_left < 0:
            raise self.error()

    def error(self) -> ValueError:
        """Returns the error for a pattern that is too much work."""
        return ValueError(
            f"regular expression {shown(self._pattern)} takes more than {self._max_work} units of work to compile: use smaller "
            "numbers in {...}, or * for them, or fewer quantifiers within each other"
        )


def shown(pattern: str) -> str:
    """Returns a pattern for an error message; only the beginning of a long one."""
    return repr(pattern) if len(pattern) <= 100 else f"{pattern[:100]!r}..."
