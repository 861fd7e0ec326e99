"""How the benchmark times: loops of calls against one call, in turns, and what the device can do at best.

    time of a call = (time of a loop of n calls - time of a loop of one) / (n - 1)

Both loops are one dispatch, so that what a dispatch costs cancels. A call that takes more than 50 ms is timed by itself.
Contenders take turns, so that a machine that slows down slows all of them.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOOP_SECONDS = 0.05
_MIN_ITERATIONS, _MAX_ITERATIONS = 8, 1000
_PEAK_ITERATIONS = 16
_GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      samples: one per repeat, dispatch left out.
      one_call: median of a dispatched call, waited for.
      num_iterations: calls per loop.
    """

    samples: tuple[float, ...]
    one_call: float
    num_iterations: int

    def quantile(self, share: float) -> float:
        """The time that this share of the samples does not exceed."""
        return float(np.quantile(self.samples, share))


class Timer:
    """Times one contender; compiles and warms up when made.

    Args:
      loop: from a number of iterations to a function that runs them, from a given pool on, and waits.
      min_iterations: of a loop, so that it visits every pool.
      calls_per_iteration: what an iteration's time is divided by.
      single_from: seconds from which on a call is timed by itself.
    """

    def __init__(
        self,
        loop: Callable[[int], Callable[[int], Any]],
        *,
        min_iterations: int = 1,
        calls_per_iteration: int = 1,
        single_from: float = _LOOP_SECONDS,
    ) -> None:
        self._calls, self._start = calls_per_iteration, 0
        self._pairs: list[tuple[float, float]] = []
        self._once = loop(1)
        self._once(0)
        seconds = min(self._seconds(self._once) for _ in range(3))
        wanted = max(math.ceil(_LOOP_SECONDS / seconds), min_iterations, _MIN_ITERATIONS)
        self._num_iterations = 1 if seconds >= single_from else min(wanted, _MAX_ITERATIONS)
        self._many = loop(self._num_iterations)
        self._many(0)

    def take_sample(self) -> None:
        """Times a loop of one, and one of many."""
        once = self._seconds(self._once)
        self._pairs.append((once, once if self._num_iterations == 1 else self._seconds(self._many)))

    def timing(self) -> Timing:
        """What the samples taken so far say; a loop of one counts as its median, lest its noise be added to theirs."""
        once, many = zip(*self._pairs, strict=True)
        one = float(np.median(once))
        count = self._num_iterations
        samples = many if count == 1 else [(seconds - one) / (count - 1) for seconds in many]
        return Timing(tuple(seconds / self._calls for seconds in samples), one / self._calls, count)

    def best(self) -> float:
        """Seconds per call, from the fastest loop of one and the fastest of many."""
        once, many = (min(seconds) for seconds in zip(*self._pairs, strict=True))
        count = self._num_iterations
        return (once if count == 1 else (many - once) / (count - 1)) / self._calls

    def _seconds(self, run: Callable[[int], Any]) -> float:
        self._start += 1  # another pool than the call before
        begin = time.perf_counter()
        run(self._start)
        return time.perf_counter() - begin


def measure(timers: Mapping[str, Timer], repeats: int) -> dict[str, Timing]:
    """Takes `repeats` samples of each, in turns."""
    for _ in range(repeats):
        for timer in timers.values():
            timer.take_sample()
    return {name: timer.timing() for name, timer in timers.items()}


def free_bytes() -> int:
    """Memory of the default device that is free, as it reports itself; on CPU, as the system does."""
    reported = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in reported:
        return reported["bytes_limit"] - reported.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The best that simple programs got out of the device in this run.

    Attributes:
      copy_bytes_per_s: reads plus writes of x + 1 over a large array.
      read_bytes_per_s: of the sum of a large array.
      matmul_flops_per_s: of a large square product, by the dtype of its operands; sums are float32.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]

    @property
    def bytes_per_s(self) -> float:
        """The better of both."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


def measure_peaks(dtypes: Sequence[str], *, cache_bytes: int, repeats: int) -> Peaks:
    """Measures them over arrays of 4 times the cache, on accelerators 1 GiB at least."""
    on_cpu = jax.default_backend() == "cpu"
    num_bytes = max(4 * cache_bytes, 2**20 if on_cpu else _GIBIBYTE)
    x = jnp.zeros((num_bytes // 4096, 1024), jnp.float32)

    copy = _best(lambda x, _: x + 1, x, None, repeats)
    read = _best(lambda total, x: total + jnp.sum(x), jnp.float32(0), x, repeats)
    size, rates = 512 if on_cpu else 8192, {}
    for dtype in dict.fromkeys(dtypes):
        w = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)) * jnp.asarray(size**-0.5, dtype)
        precision = lax.Precision.HIGHEST if dtype == "float32" else None

        def product(x: jax.Array, w: jax.Array, precision: Any = precision) -> jax.Array:
            return jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)

        rates[dtype] = 2 * size**3 / _best(product, w, w, repeats)
    return Peaks(2 * x.nbytes / copy, x.nbytes / read, rates)


def _best(call: Callable[[Any, Any], Any], carry: Any, operand: Any, repeats: int) -> float:
    """Fewest seconds of `carry = call(carry, operand)`."""

    def loop(num_iterations: int) -> Callable[[int], Any]:
        def body(_: Any, carry: Any, operand: Any) -> Any:
            return call(*lax.optimization_barrier((carry, operand)))  # or what does not change is computed once

        @jax.jit
        def run(carry: Any, operand: Any) -> Any:
            return lax.fori_loop(0, num_iterations, functools.partial(body, operand=operand), carry)

        return lambda _: jax.block_until_ready(run(carry, operand))

    timer = Timer(loop, min_iterations=_PEAK_ITERATIONS, single_from=math.inf)
    for _ in range(repeats):
        timer.take_sample()
    return timer.best()
