"""A process that starts an engine, serves one token and prints the time of each phase; `benchmark_startup.py` runs it.

The argument is a JSON object with the fields of `EngineOptions` and the length of the prompt. The last line of stdout is a JSON
object with the times and the numbers of compiled programs.
"""

import time

_STAMPS = {"python": time.time()}  # before anything else is imported

import collections  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine and returns when each phase ended, by the wall clock, which the parent process reads too."""
    import jax

    _stamp("jax")
    import jaxserve
    from jaxserve.commands.flags import EngineOptions
    from jaxserve.commands.make_engine import make_engine

    _stamp("jaxserve")
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: events.update([event]))
    config = jaxserve.EngineConfig.from_dict(settings["config"])
    fields = {name: value for name, value in settings.items() if name not in ("config", "prompt_len")}
    engine = make_engine(EngineOptions(**fields, config=config))
    _stamp("load")
    engine.warm_up()
    _stamp("compile")
    params = jaxserve.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine.add_request([1] * settings["prompt_len"], params)
    while not any(update.token_ids for update in engine.step(1)):
        pass
    _stamp("first_token")
    return {
        "stamps": _STAMPS,
        "backend": engine.config.backend,
        "programs": events["/jax/core/compile/backend_compile_duration"],
        "programs_from_cache": events["/jax/compilation_cache/cache_hits"],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _stamp(name: str) -> None:
    _STAMPS[name] = time.time()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
