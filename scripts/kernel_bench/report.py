"""Records and tables of the kernels' benchmark."""

from lib.peaks import Peaks
from lib.records import Record, provenance, rounded
from lib.table import Table, number, percent

_METHOD = {
    "kernel": "(time of a loop of n calls - median time of a loop of one) / (n - 1), each call on the result of the one "
    "before, pools in turns; calls of 50 ms or more by themselves; contenders in turns",
    "step": "(time of run_steps(n) - median time of run_steps(1)) / (n - 1), all slots decoding, random weights, keys and "
    "values; prefill: median of 3, from a submitted prompt to its first token",
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
    "p90 ms": 8,
    "tokens/s": 9,
    "GB/s": 8,
    "of roofline": 11,
    "prefill tokens/s": 16,
    "TFLOP/s": 8,
    "of peak": 7,
}


def environment(peaks: Peaks, method: str, seed: int) -> Record:
    """Returns the fields of every record of a run: where and how it was measured, and the peaks of the device.

    Args:
      peaks: the peaks, measured in the same run.
      method: "kernel" or "step".
      seed: seed of the data.
    """
    return {
        "copy_bytes_per_s": rounded(peaks.copy_bytes_per_s),
        "read_bytes_per_s": rounded(peaks.read_bytes_per_s),
        "matmul_flops_per_s": {dtype: rounded(rate) for dtype, rate in peaks.matmul_flops_per_s.items()},
        **provenance(_METHOD[method], seed),
    }


def rates(num_bytes: int, flops: int | None, seconds: float, peaks: Peaks, product_dtype: str) -> Record:
    """Returns work per second, and its shares of the device's peaks; `flops` is None if nothing is multiplied."""
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


class ReportTable:
    """Prints records as they come: a table row for a record with times, a line with the reason for one without.

    Args:
      step: True for the engine's step, False for kernels.
    """

    def __init__(self, *, step: bool) -> None:
        self._table = Table(_STEP_COLUMNS if step else _COLUMNS)
        self._lines: set[str] = set()

    def print(self, record: Record) -> None:
        """Prints the record; a line that was printed before is not repeated."""
        if record["status"] == "timed":
            self._table.print_row(_step_cells(record) if record["op"] == "step" else _kernel_cells(record))
            return
        name = "step" if record["op"] == "step" else record["contender"]
        line = f"  {name} {record['status']}: {record['reason']}"
        if record["status"] == "failed":
            line += f" ({_parameters(record)})"
        if line not in self._lines:
            print(line, flush=True)
            self._lines.add(line)


def _step_cells(record: Record) -> Record:
    return {
        "model": record["model"],
        "dtype": record["dtype"],
        "backend": record["backend"],
        "slots": record["slots"],
        "context": record["context"],
        "ms/step": record["median_us"] / 1e3,
        "p90 ms": record["p90_us"] / 1e3,
        "tokens/s": record["tokens_per_s"],
        "GB/s": record["bytes_per_s"] / 1e9,
        "of roofline": percent(record["share_of_roofline"], 1),
        "prefill tokens/s": record["prefill_tokens_per_s"],
        "TFLOP/s": record["prefill_flops_per_s"] / 1e12,
        "of peak": percent(record["prefill_share_of_matmul_rate"], 1),
    }


def _kernel_cells(record: Record) -> Record:
    flops = record["flops_per_s"]
    return {
        "op": record["op"],
        "shape": record["shape"],
        "dtype": record["dtype"],
        "batch": record["batch"],
        "context": record["context"],
        "page": record["page_size"],
        "splits": record["num_splits"],
        "contender": record["contender"],
        "median us": record["median_us"],
        "min us": record["min_us"],
        "p90 us": record["p90_us"],
        "GB/s": record["bytes_per_s"] / 1e9,
        "of copy": percent(record["share_of_copy_bandwidth"], 1),
        "of read": percent(record["share_of_read_bandwidth"], 1),
        "TFLOP/s": None if flops is None else number(flops / 1e12),
        "of peak": percent(record["share_of_matmul_rate"], 1),
    }


def _parameters(record: Record) -> str:
    if record["op"] == "step":
        return f"{record['slots']} slots, context {record['context']}"
    return f"{record['op']} {record['shape']} {record['dtype']}, {record['batch']} rows, context {record['context']}"
