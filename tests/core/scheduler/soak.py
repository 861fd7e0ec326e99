"""Runs the scheduler against its oracle for as long as you like; before a release, for a million steps.

    python -m tests.core.scheduler.soak --steps=1000000
    python -m tests.core.scheduler.soak --seconds=600 --seed=7

It runs random traces over all configurations of `tests/core/scheduler/traces.py`, as the tests do. The first difference is
printed with the seed and the configuration that repeat it, and the exit status is 1.
"""

import collections
import sys
import time

from absl import app, flags, logging

from jaxserve.core.scheduler import InvariantError
from tests.core.scheduler import traces

STEPS_PER_TRACE = 10_000


def soak(num_steps: int, first_seed: int, seconds: float) -> collections.Counter[str]:
    """Runs one trace after another, each with a new seed and the configurations in turn. Returns counts of events.

    Raises:
      RuntimeError: if a trace fails; the message says how to repeat it.
    """
    devices = {name: traces.Device(config) for name, config in traces.CONFIGS.items()}
    events: collections.Counter[str] = collections.Counter()
    start, seed = time.monotonic(), first_seed
    while events["steps"] < num_steps and time.monotonic() - start < seconds:
        for name, device in devices.items():
            try:
                events += traces.run_trace(device, seed=seed, num_steps=STEPS_PER_TRACE)
            except (AssertionError, InvariantError) as error:
                raise RuntimeError(f"configuration {name!r}: {error}; repeat it with --seed={seed}") from error
            if events["steps"] >= num_steps or time.monotonic() - start >= seconds:
                break
        logging.info("%d steps, %d preemptions, %.0f s", events["steps"], events["preempted"], time.monotonic() - start)
        seed += 1
    return events


def main(_: list[str]) -> None:
    try:
        events = soak(STEPS.value, SEED.value, SECONDS.value)
    except RuntimeError as error:
        sys.exit(str(error))
    for event, count in sorted(events.items()):
        print(f"{count:>10} {event}")


if __name__ == "__main__":
    STEPS = flags.DEFINE_integer("steps", 1_000_000, "Steps to run at least.", lower_bound=1)
    SEED = flags.DEFINE_integer("seed", 0, "Seed of the first trace; each further trace has the next one.")
    SECONDS = flags.DEFINE_float(
        "seconds", float("inf"), "Start no further trace after so many seconds.", lower_bound=0
    )
    app.run(main)
