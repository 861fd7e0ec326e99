"""A file of results: JSON lines that are never lost and never look complete before they are."""

import errno
import json
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self


class ResultsFile:
    """A context manager that writes one JSON line per result and flushes each at once.

    The lines go to `<path>.partial`, which is renamed to `path` when the context ends without an error. So a file at `path` is
    always complete. After Ctrl-C or an error, the lines so far stay in the partial file, and an older file at `path` is
    untouched; a partial file without any line is deleted. If `path` is a pipe, a terminal or another thing that is no regular
    file, the lines go straight to it.

    Attributes:
      path: the file that holds all results in the end; the target, where the given path is a symbolic link.
      partial_path: the file that is being written.
      num_records: the number of lines written so far.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Opens the file, so that a path that cannot be written is refused before any work is done.

        Raises:
          ValueError: if the file cannot be written, or the partial file holds results of an earlier run.
        """
        if not str(path):
            raise ValueError("the path of the results file is empty: name a file")
        direct = os.path.exists(path) and not os.path.isfile(path)
        self.path = pathlib.Path(path if direct else os.path.realpath(path))
        self.partial_path = self.path if direct else self.path.with_name(self.path.name + ".partial")
        self.num_records = 0
        self._is_partial = False
        if not direct and self.partial_path.is_file() and self.partial_path.stat().st_size:
            raise ValueError(
                f"{str(self.partial_path)!r} holds results of a run that was interrupted: move it away, or delete it"
            )
        try:
            if os.path.isfile(path) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._file = open(self.partial_path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise ValueError(f"cannot write results to {str(path)!r}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one line."""
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self.num_records += 1

    def leave_partial(self) -> None:
        """Declares that results are missing, so that the lines stay in the partial file when the context ends."""
        self._is_partial = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self.partial_path == self.path:
            return
        if kind is None and not self._is_partial:
            os.replace(self.partial_path, self.path)
        elif not self.partial_path.stat().st_size:
            self.partial_path.unlink()
