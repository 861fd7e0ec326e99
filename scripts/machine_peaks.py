"""The best matmul rate and memory bandwidth that simple programs get out of the device, whichever way is fastest.

    python scripts/machine_peaks.py --dtypes=bfloat16,float32

Prints one JSON line. On CPU the ways are XLA's and, where it is installed, PyTorch's products of square matrices, and reads by
XLA, PyTorch and one NumPy thread per core over an array that no cache holds. On accelerators they are XLA's
(`kernel_timing.py`).
"""

import concurrent.futures
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from lib.report import provenance
from lib.timing import measure_peaks

_CACHE_MB = {"cpu": 64, "gpu": 64}
_SIZES = (512, 1024, 2048)
_REPEATS = 5


def measure(dtypes: Sequence[str]) -> dict[str, Any]:
    """Peaks, each with the way that reached it, and where they were measured; rates per second."""
    platform = jax.default_backend()
    cache_bytes = _CACHE_MB.get(platform, 64) << 20
    peaks = measure_peaks(dtypes, cache_bytes=cache_bytes, repeats=_REPEATS)
    products = {f"XLA {dtype}": rate for dtype, rate in peaks.matmul_flops_per_s.items()}
    reads = {"XLA sum": peaks.read_bytes_per_s, "XLA copy": peaks.copy_bytes_per_s}
    if platform == "cpu":
        products |= _torch_products(dtypes)
        reads |= _torch_read(4 * cache_bytes) | _numpy_read(4 * cache_bytes)
    product, read = max(products, key=products.__getitem__), max(reads, key=reads.__getitem__)
    return {
        "provenance": provenance("", seed=0),
        "matmul": {"way": product, "flops_per_s": products[product]},
        "read": {"way": read, "bytes_per_s": reads[read]},
        "all_matmul_flops_per_s": products,
        "all_read_bytes_per_s": reads,
    }


def _torch_products(dtypes: Sequence[str]) -> dict[str, float]:
    try:
        import torch
    except ImportError:
        return {}
    rates = {}
    for dtype in dtypes:
        for size in _SIZES:
            w = torch.randn(size, size).to(getattr(torch, dtype))
            seconds = _fewest_seconds(lambda w=w: torch.matmul(w, w))
            rates[f"torch {dtype} {size}"] = 2 * size**3 / seconds
    return rates


def _torch_read(num_bytes: int) -> dict[str, float]:
    try:
        import torch
    except ImportError:
        return {}
    x = torch.ones(num_bytes // 4)
    return {"torch sum": num_bytes / _fewest_seconds(lambda: x.sum().item())}


def _numpy_read(num_bytes: int) -> dict[str, float]:
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), os.cpu_count() or 1)  # zeros would be no memory at all
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:  # numpy lets go of the lock
        return {"numpy sum": num_bytes / _fewest_seconds(lambda: list(pool.map(np.sum, parts)))}


def _fewest_seconds(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(3 * _REPEATS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Prints the peaks."""
    if argv[1:]:
        print(f"error: unexpected argument {argv[1]!r}: there are only flags", file=sys.stderr)
        return 1
    for dtype in values.dtypes:
        if dtype not in ("bfloat16", "float16", "float32"):
            print(f"error: --dtypes: {dtype!r} is unknown: use bfloat16, float16, float32", file=sys.stderr)
            return 1
    print(json.dumps(measure(values.dtypes)), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Of the products.")
    app.run(main)
