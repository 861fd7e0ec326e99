"""Measures the best rates that this machine reaches with any of several simple programs.

XLA's programs are those of `peaks.py`. On a CPU, PyTorch's products and the reads of PyTorch and NumPy compete with them.
"""

import concurrent.futures
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from lib.peaks import LARGEST_CPU_SIZE, PRODUCT_BUDGET_S, affordable_sizes, estimated_seconds, measure_peaks
from lib.records import provenance

_CACHE_MB = 64
_SIZES = (128, 256, 512, 1024, 2048)
_REPEATS = 5  # repeats of XLA's loops; other calls are so short that they are repeated three times as often


def measure(dtypes: Sequence[str]) -> dict[str, Any]:
    """Returns each peak with the program that reached it, the machine, and notes on programs that were too slow."""
    platform = jax.default_backend()
    cache_bytes = _CACHE_MB << 20
    peaks = measure_peaks(dtypes, cache_bytes=cache_bytes, repeats=_REPEATS)
    products = {f"XLA {dtype}": rate for dtype, rate in peaks.matmul_flops_per_s.items()}
    reads = {"XLA sum": peaks.read_bytes_per_s, "XLA copy": peaks.copy_bytes_per_s}
    notes = []
    if platform == "cpu":
        largest = {f"XLA {dtype}": (size, LARGEST_CPU_SIZE) for dtype, size in peaks.matmul_sizes.items()}
        for dtype in dtypes:
            rates = _torch_products(dtype)
            products |= {f"torch {dtype} {size}": rate for size, rate in rates.items()}
            largest |= {f"torch {dtype}": (max(rates), _SIZES[-1])} if rates else {}
        reads |= _torch_read(4 * cache_bytes) | _numpy_read(4 * cache_bytes)
        notes = [_note(way, *sizes) for way, sizes in largest.items() if sizes[0] < sizes[1]]
    product, read = max(products, key=products.__getitem__), max(reads, key=reads.__getitem__)
    return {
        "provenance": provenance("", seed=0),
        "matmul": {"way": product, "flops_per_s": products[product]},
        "read": {"way": read, "bytes_per_s": reads[read]},
        "all_matmul_flops_per_s": products,
        "all_read_bytes_per_s": reads,
        "notes": notes,
    }


def _note(way: str, measured: int, largest: int) -> str:
    return f"{way}: products of {measured} x {measured}; {largest} x {largest} would take more than {PRODUCT_BUDGET_S:.0f} s"


def _torch_products(dtype: str) -> dict[int, float]:
    """Returns the FLOPs per second of PyTorch's products by size; empty without PyTorch."""
    try:
        import torch
    except ImportError:
        return {}

    def product(size: int) -> Callable[[], Any]:
        w = torch.randn(size, size).to(getattr(torch, dtype))
        return lambda: torch.matmul(w, w)

    return rates_by_size(product, _SIZES)


def rates_by_size(product: Callable[[int], Callable[[], Any]], sizes: Sequence[int]) -> dict[int, float]:
    """Measures square products of ascending sizes, as far as the time budget goes.

    Args:
      product: makes a function that multiplies two matrices of a size.
      sizes: edges of the matrices.

    Returns:
      FLOPs per second by size.
    """
    chosen = affordable_sizes(
        lambda size: estimated_seconds(product(size)), sizes, num_calls=3 * _REPEATS, budget_s=PRODUCT_BUDGET_S
    )
    return {size: 2 * size**3 / _fewest_seconds(product(size)) for size in chosen}


def _torch_read(num_bytes: int) -> dict[str, float]:
    try:
        import torch
    except ImportError:
        return {}
    x = torch.ones(num_bytes // 4)
    return {"torch sum": num_bytes / _fewest_seconds(lambda: x.sum().item())}


def _numpy_read(num_bytes: int) -> dict[str, float]:
    # The array holds ones, because pages of zeros might not exist in memory. NumPy releases the lock of the interpreter.
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        return {"numpy sum": num_bytes / _fewest_seconds(lambda: list(pool.map(np.sum, parts)))}


def _fewest_seconds(call: Callable[[], object]) -> float:
    call()
    samples = []
    for _ in range(3 * _REPEATS):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)
