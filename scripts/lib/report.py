"""What the benchmark says: one record per measurement, as a row of a table, a line of CSV, a line of JSON."""

import contextlib
import csv
import datetime
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib
from lib.timing import Peaks, Timing

from jaxserve.commands.results_file import ResultsFile

Record = dict[str, Any]
Write = Callable[[Record], None]
_METHOD = {
    "kernel": "(time of a loop of n calls - time of a loop of one) / (n - 1), each call on the result of the one before, pools "
    "in turns; calls of 50 ms or more by themselves; contenders in turns",
    "step": "(time of run_steps(n) - time of run_steps(1)) / (n - 1), all slots decoding, random weights, keys and values; "
    "prefill: median of 3, from a submitted prompt to its first token",
}
_COLUMNS = {  # heading: width
    "op": 12,
    "shape": 18,
    "dtype": 13,
    "batch": 6,
    "context": 7,
    "page": 4,
    "splits": 6,
    "contender": 10,
    "median us": 10,
    "min us": 10,
    "p90 us": 10,
    "GB/s": 8,
    "of copy": 7,
    "of read": 7,
    "TFLOP/s": 8,
    "of peak": 7,
}
_STEP_COLUMNS = {
    "model": 24,
    "dtype": 8,
    "backend": 10,
    "slots": 5,
    "context": 7,
    "ms/step": 8,
    "p90": 8,
    "tokens/s": 9,
    "GB/s": 8,
    "of roofline": 11,
    "prefill tokens/s": 16,
    "TFLOP/s": 8,
    "of peak": 7,
}


def device_name() -> str:
    """The default device's kind; of a CPU its model and the cores in use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {os.cpu_count()} cores"


def environment(peaks: Peaks, method: str, seed: int) -> Record:
    """What holds for all records of a run: where, with what, how, and what the device could do."""
    return {
        "copy_bytes_per_s": rounded(peaks.copy_bytes_per_s),
        "read_bytes_per_s": rounded(peaks.read_bytes_per_s),
        "matmul_flops_per_s": {dtype: rounded(rate) for dtype, rate in peaks.matmul_flops_per_s.items()},
        **provenance(_METHOD[method], seed),
    }


def provenance(method: str, seed: int) -> Record:
    """The same, where nothing is compared with what the device could do."""
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
    """The checkout that the scripts lie in; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def times(timing: Timing) -> Record:
    """Microseconds per call."""
    return {
        "median_us": rounded(1e6 * timing.quantile(0.5)),
        "min_us": rounded(1e6 * timing.quantile(0.0)),
        "p90_us": rounded(1e6 * timing.quantile(0.9)),
        "one_call_us": rounded(1e6 * timing.one_call),
        "iterations": timing.num_iterations,
    }


def rates(num_bytes: int, flops: int | None, seconds: float, peaks: Peaks, product_dtype: str) -> Record:
    """Work per second, and its shares of what the device could do."""
    shares = {
        "share_of_copy_bandwidth": rounded(num_bytes / seconds / peaks.copy_bytes_per_s),
        "share_of_read_bandwidth": rounded(num_bytes / seconds / peaks.read_bytes_per_s),
        "share_of_matmul_rate": None,
    }
    if flops is not None:
        shares["share_of_matmul_rate"] = rounded(flops / seconds / peaks.matmul_flops_per_s[product_dtype])
    return {
        "bytes": num_bytes,
        "bytes_per_s": rounded(num_bytes / seconds),
        "flops": flops,
        "flops_per_s": None if flops is None else rounded(flops / seconds),
        **shares,
    }


def rounded(value: float) -> float | None:
    """Four digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None


@contextlib.contextmanager
def outputs(csv_path: str | None, json_path: str | None, common: Callable[[], Record]) -> Iterator[Write]:
    """A function that writes a record, with what is common to all, to the files asked for.

    Raises:
      ValueError: if a file cannot be written, before anything is measured.
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


def print_header(*, step: bool = False) -> None:
    """The headings of the table."""
    _print_cells(dict.fromkeys(_STEP_COLUMNS if step else _COLUMNS), step=step, heading=True)


def print_row(record: Record, reasons: set[tuple[str, str]]) -> None:
    """A row for what was timed; a line for what was not, unless `reasons`, where it is put, has the same line already."""
    step = record["op"] == "step"
    if record["status"] != "timed":
        name = "step" if step else record["contender"]
        line = f"{name} {record['status']}: {record['reason']}"
        if record["status"] == "failed":
            line += f" ({_parameters(record)})"
        if (name, line) not in reasons:
            print(f"  {line}", flush=True)
            reasons.add((name, line))
        return
    cells = {
        "op": record["op"],
        "dtype": record["dtype"],
        "context": record["context"],
        "GB/s": _billions(record["bytes_per_s"]),
    }
    if step:
        cells |= {
            "model": record["model"],
            "backend": record["backend"],
            "slots": record["slots"],
            "ms/step": _number(record["median_us"] / 1e3),
            "p90": _number(record["p90_us"] / 1e3),
            "tokens/s": _number(record["tokens_per_s"]),
            "of roofline": _percent(record["share_of_roofline"]),
            "prefill tokens/s": _number(record["prefill_tokens_per_s"]),
            "TFLOP/s": _number(record["prefill_flops_per_s"] / 1e12),
            "of peak": _percent(record["prefill_share_of_matmul_rate"]),
        }
    else:
        flops = record["flops_per_s"]
        cells |= {
            "shape": record["shape"],
            "batch": record["batch"],
            "page": record["page_size"],
            "splits": record["num_splits"] or "",
            "contender": record["contender"],
            "median us": _number(record["median_us"]),
            "min us": _number(record["min_us"]),
            "p90 us": _number(record["p90_us"]),
            "of copy": _percent(record["share_of_copy_bandwidth"]),
            "of read": _percent(record["share_of_read_bandwidth"]),
            "TFLOP/s": "" if flops is None else _number(flops / 1e12),
            "of peak": "" if flops is None else _percent(record["share_of_matmul_rate"]),
        }
    _print_cells(cells, step=step)


def _parameters(record: Record) -> str:
    if record["op"] == "step":
        return f"{record['slots']} slots, context {record['context']}"
    return f"{record['op']} {record['shape']} {record['dtype']}, {record['batch']} rows, context {record['context']}"


def _print_cells(cells: dict[str, Any], *, step: bool, heading: bool = False) -> None:
    columns = _STEP_COLUMNS if step else _COLUMNS
    texts = ((name if heading else str(cells[name])).rjust(width) for name, width in columns.items())
    print("  ".join(texts), flush=True)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _billions(value: float) -> str:
    return _number(value / 1e9)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
