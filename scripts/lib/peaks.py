"""Measures the peaks of simple XLA programs on the default device: bytes per second, and FLOPs per second of products."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from lib.timing import Timer

_PEAK_ITERATIONS = 16
_GIBIBYTE = 2**30
_MAX_ESTIMATES, _ESTIMATE_S = 5, 0.1
LARGEST_CPU_SIZE = 512
PRODUCT_BUDGET_S = 10.0  # time for the products of one dtype
_CPU_SIZES, _ACCELERATOR_SIZES = (128, 256, LARGEST_CPU_SIZE), (8192,)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The rates that the device reached in this run.

    Attributes:
      copy_bytes_per_s: reads plus writes of x + 1 over a large array.
      read_bytes_per_s: reads of the sum of a large array.
      matmul_flops_per_s: rate of a square product, by the dtype of its operands; sums are float32.
      matmul_sizes: edge of that product's matrices, by dtype.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]
    matmul_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bytes_per_s(self) -> float:
        """The higher one of the two bandwidths."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


def affordable_sizes(
    seconds_of: Callable[[int], float], sizes: Sequence[int], *, num_calls: int, budget_s: float
) -> list[int]:
    """Returns the sizes of square products that can be measured in the time budget.

    Some products are very slow: XLA and PyTorch multiply bfloat16 matrices of 2048 x 2048 for minutes on CPUs without
    AVX-512. So a size is measured only if it fits into the budget at the speed of the size before it.

    Args:
      seconds_of: measures one product of a size.
      sizes: edges of the matrices, ascending; the first one is always chosen.
      num_calls: products of each size that the measurement will make.
      budget_s: seconds for all chosen sizes together.
    """
    chosen = [sizes[0]]
    seconds = seconds_of(sizes[0])
    left_s = budget_s - num_calls * seconds
    for size in sizes[1:]:
        expected_s = seconds * (size / chosen[-1]) ** 3
        if num_calls * expected_s > left_s:
            break
        chosen.append(size)
        seconds = seconds_of(size)
        left_s -= num_calls * seconds
    return chosen


def estimated_seconds(call: Callable[[], Any]) -> float:
    """Returns the fewest seconds of up to five calls after one that may compile; slow calls are made once."""
    call()
    samples: list[float] = []
    while len(samples) < _MAX_ESTIMATES and sum(samples) < _ESTIMATE_S:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


def measure_peaks(dtypes: Sequence[str], *, cache_bytes: int, repeats: int) -> Peaks:
    """Measures the peaks over arrays of 4 times the cache, on accelerators of at least 1 GiB.

    Products get at most about 10 s per dtype: where a small one is slow, larger ones are not measured.
    """
    on_cpu = jax.default_backend() == "cpu"
    num_bytes = max(4 * cache_bytes, 2**20 if on_cpu else _GIBIBYTE)
    x = jnp.zeros((num_bytes // 4096, 1024), jnp.float32)

    copy = _fewest_seconds(lambda x, _: x + 1, x, None, repeats)
    read = _fewest_seconds(lambda total, x: total + jnp.sum(x), jnp.float32(0), x, repeats)
    rates, measured_sizes = {}, {}
    for dtype in dict.fromkeys(dtypes):
        sizes, num_calls = _CPU_SIZES if on_cpu else _ACCELERATOR_SIZES, (repeats + 1) * (_PEAK_ITERATIONS + 1)
        product = jax.jit(functools.partial(_product, dtype=dtype))

        def seconds_of(size: int, product: Any = product, dtype: str = dtype) -> float:
            w = _matrix(size, dtype)
            return estimated_seconds(lambda: jax.block_until_ready(product(w, w)))

        size = sizes[0]
        if len(sizes) > 1:
            size = affordable_sizes(seconds_of, sizes, num_calls=num_calls, budget_s=PRODUCT_BUDGET_S)[-1]
        w = _matrix(size, dtype)
        rates[dtype] = 2 * size**3 / _fewest_seconds(functools.partial(_product, dtype=dtype), w, w, repeats)
        measured_sizes[dtype] = size
    return Peaks(2 * x.nbytes / copy, x.nbytes / read, rates, measured_sizes)


def _matrix(size: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)) * jnp.asarray(size**-0.5, dtype)


def _product(x: jax.Array, w: jax.Array, *, dtype: str) -> jax.Array:
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def _fewest_seconds(call: Callable[[Any, Any], Any], carry: Any, operand: Any, repeats: int) -> float:
    """Returns the fewest seconds of `carry = call(carry, operand)`."""

    def loop(num_iterations: int) -> Callable[[int], Any]:
        def body(_: Any, carry: Any, operand: Any) -> Any:
            # Without the barrier XLA would compute the parts that do not change once, before the loop.
            return call(*lax.optimization_barrier((carry, operand)))

        @jax.jit
        def run(carry: Any, operand: Any) -> Any:
            return lax.fori_loop(0, num_iterations, functools.partial(body, operand=operand), carry)

        return lambda _: jax.block_until_ready(run(carry, operand))

    timer = Timer(loop, min_iterations=_PEAK_ITERATIONS, single_from=math.inf)
    for _ in range(repeats):
        timer.take_sample()
    return timer.best()
