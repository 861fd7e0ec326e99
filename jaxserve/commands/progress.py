"""A progress bar that counts finished requests."""

import sys
from typing import Any, Self


class Progress:
    """A context manager that shows a bar on stderr, if that is a terminal and there is more than one request."""

    def __init__(self, num_requests: int) -> None:
        """Sets how many requests there are; nothing is shown before the context is entered."""
        self._num_requests = num_requests
        self._bar: Any = None

    def advance(self) -> None:
        """Counts one finished request."""
        if self._bar is not None:
            self._bar.update(1)

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and self._num_requests > 1:
            import tqdm

            self._bar = tqdm.tqdm(total=self._num_requests, unit="request", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
