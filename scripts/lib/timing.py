"""Times calls without the cost of a dispatch, contenders in turns.

    time of a call = (time of a loop of n calls - median time of a loop of one) / (n - 1)

Both loops are one dispatch each, so the difference holds the calls alone. Contenders take turns, so a machine that slows down
slows all of them.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_LOOP_SECONDS = 0.05
_MIN_ITERATIONS, _MAX_ITERATIONS = 8, 1000


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      samples: one per repeat, without the dispatch.
      one_call: median of a single call, from its dispatch until its result is ready.
      num_iterations: calls per loop.
    """

    samples: tuple[float, ...]
    one_call: float
    num_iterations: int

    def quantile(self, share: float) -> float:
        """Returns the time that this share of the samples does not exceed."""
        return float(np.quantile(self.samples, share))


class PairedTimes:
    """Pairs of the times of a loop of one and of a loop of many, and the time per call that follows from them.

    Args:
      num_iterations: iterations of the longer loop; 1 if calls are so long that each is timed alone.
      calls_per_iteration: calls in each iteration of both loops.
    """

    def __init__(self, num_iterations: int, calls_per_iteration: int = 1) -> None:
        self.num_iterations, self._calls = num_iterations, calls_per_iteration
        self._pairs: list[tuple[float, float]] = []

    def add(self, one_seconds: float, many_seconds: float) -> None:
        """Adds a sample: the times of a loop of one and of a loop of `num_iterations`."""
        self._pairs.append((one_seconds, many_seconds))

    def timing(self) -> Timing:
        """Returns the times of a call; loops of one count as their median, so that their noise is not added to each sample."""
        one_seconds, many_seconds = zip(*self._pairs, strict=True)
        one = float(np.median(one_seconds))
        samples = tuple(self._per_call(one, many) for many in many_seconds)
        return Timing(samples, one / self._calls, self.num_iterations)

    def best(self) -> float:
        """Returns the seconds per call of the fastest loop of one and the fastest loop of many."""
        return self._per_call(*(min(seconds) for seconds in zip(*self._pairs, strict=True)))

    def _per_call(self, one: float, many: float) -> float:
        seconds = many if self.num_iterations == 1 else (many - one) / (self.num_iterations - 1)
        return seconds / self._calls


class Timer:
    """Times one contender; making it compiles and warms up.

    Args:
      loop: takes a number of iterations and returns a function that runs them and waits for the result. That function takes a
        running number, from which the loop chooses where it starts (kernels: with another pool each time).
      min_iterations: fewest iterations of the longer loop, so that it visits every pool.
      calls_per_iteration: calls in each iteration.
      single_from: a call that takes at least this many seconds is timed alone.
    """

    def __init__(
        self,
        loop: Callable[[int], Callable[[int], Any]],
        *,
        min_iterations: int = 1,
        calls_per_iteration: int = 1,
        single_from: float = _LOOP_SECONDS,
    ) -> None:
        self._start = 0
        self._once = loop(1)
        self._once(0)
        seconds = min(self._seconds(self._once) for _ in range(3))
        enough = max(math.ceil(_LOOP_SECONDS / seconds), min_iterations, _MIN_ITERATIONS)
        num_iterations = 1 if seconds >= single_from else min(enough, _MAX_ITERATIONS)
        self._times = PairedTimes(num_iterations, calls_per_iteration)
        self._many = loop(num_iterations)
        self._many(0)

    @property
    def num_iterations(self) -> int:
        """Iterations of the longer loop."""
        return self._times.num_iterations

    def take_sample(self) -> None:
        """Times a loop of one and a loop of many."""
        one = self._seconds(self._once)
        self._times.add(one, one if self.num_iterations == 1 else self._seconds(self._many))

    def timing(self) -> Timing:
        """Returns the times from the samples so far."""
        return self._times.timing()

    def best(self) -> float:
        """Returns the fewest seconds per call."""
        return self._times.best()

    def _seconds(self, run: Callable[[int], Any]) -> float:
        self._start += 1
        begin = time.perf_counter()
        run(self._start)
        return time.perf_counter() - begin


def measure(timers: Mapping[str, Timer], repeats: int) -> dict[str, Timing]:
    """Takes `repeats` samples of each timer, in turns, and returns their times."""
    for _ in range(repeats):
        for timer in timers.values():
            timer.take_sample()
    return {name: timer.timing() for name, timer in timers.items()}
