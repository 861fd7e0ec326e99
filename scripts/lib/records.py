"""Records of measurements: where and how they were measured, their numbers, and the files that they are written to."""

import contextlib
import csv
import datetime
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from lib.device import device_name
from lib.timing import Timing

from jaxserve.commands.results_file import ResultsFile

Record = dict[str, Any]
Write = Callable[[Record], None]

PERCENTILES = {"median": 50, "p90": 90, "p99": 99}


def provenance(method: str, seed: int) -> Record:
    """Returns the fields about the origin of a record: device, versions, commit, date, seed and method."""
    return {
        "device": device_name(),
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "torch": _torch_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "seed": seed,
        "method": method,
    }


def _torch_version() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


def commit() -> str | None:
    """Returns the commit of the checkout that holds the scripts, marked "dirty" after changes; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def rounded(value: float) -> float | None:
    """Rounds a value to four digits; returns None for infinities and NaN, which JSON cannot hold."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None


def spread(samples: Sequence[float]) -> Record:
    """Returns mean, median and percentiles of the samples, each None if there are no samples."""
    if not len(samples):
        return dict.fromkeys(("mean", *PERCENTILES))
    percentiles = np.percentile(samples, list(PERCENTILES.values()))
    values = dict(zip(PERCENTILES, map(float, percentiles), strict=True))
    return {name: rounded(value) for name, value in {"mean": float(np.mean(samples)), **values}.items()}


def times(timing: Timing) -> Record:
    """Returns the times of a call in microseconds."""
    return {
        "median_us": rounded(1e6 * timing.quantile(0.5)),
        "min_us": rounded(1e6 * timing.quantile(0.0)),
        "p90_us": rounded(1e6 * timing.quantile(0.9)),
        "one_call_us": rounded(1e6 * timing.one_call),
        "iterations": timing.num_iterations,
    }


@contextlib.contextmanager
def outputs(csv_path: str | None, json_path: str | None, common: Callable[[], Record]) -> Iterator[Write]:
    """Opens the files of a run and yields a function that writes a record to each of them.

    Args:
      csv_path: a file for lines of CSV; None: no such file.
      json_path: a file for JSON lines; None: no such file.
      common: function that returns the fields to add to a record; called once per record.

    Raises:
      ValueError: if a file cannot be written. It is raised before anything is measured.
    """
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(ResultsFile(json_path)) if json_path is not None else None
        table = stack.enter_context(_open(csv_path)) if csv_path is not None else None
        writer: csv.DictWriter[str] | None = None

        def write(record: Record) -> None:
            nonlocal writer
            record = record | common()
            if lines is not None:
                lines.write(record)
            if table is not None:
                if writer is None:
                    writer = csv.DictWriter(table, list(record))
                    writer.writeheader()
                writer.writerow(record)
                table.flush()

        yield write


def _open(path: str) -> Any:
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise ValueError(f"cannot write measurements to {path!r}: {error.strerror}") from error
