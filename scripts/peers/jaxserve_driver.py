"""The driver of jaxserve, in a process of its own like its peers; it also reports the steps."""

import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np
from lib.roofline import work_of_steps
from lib.workloads import Workload
from peers.memory import forget_peak, peak_bytes, resident_bytes
from peers.protocol import Round, Settings, serve

from jaxserve import Engine, EngineConfig
from jaxserve.core.cache import bytes_per_page
from jaxserve.engine.capacity import resolve_capacities
from jaxserve.models import checkpoint, families
from jaxserve.models.params import random_params
from jaxserve.models.prepare import prepare_and_free
from jaxserve.timeline import Timeline, save_timeline


class StepClock:
    """An engine's observer that records the steps, and when the host read them.

    The host does not see the steps of a call one by one, so they share the time since the last read evenly.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.timeline = Timeline(config)
        self._num_steps = 0
        self._ends: list[float] = []  # seconds at which each step ended
        self._last = time.perf_counter()

    def observe(self, outputs: Any, samples_by_row: Any, num_waiting: int) -> None:
        """Records the steps of one call."""
        self.timeline.observe(outputs, samples_by_row, num_waiting)
        now, count = time.perf_counter(), int(outputs.num_steps)
        self._ends += [self._last + (now - self._last) * (index + 1) / count for index in range(count)]
        self._last = now

    def seconds_per_token(self) -> list[float]:
        """Returns, per sequence of two tokens or more, the time from first to last token over the tokens after the first."""
        steps = self.timeline.steps()
        step, slot = np.nonzero(steps.sampled & (steps.occupant >= 0))
        steps_of: dict[int, list[int]] = {}
        for occupant, index in zip(steps.occupant[step, slot].tolist(), step.tolist(), strict=True):
            steps_of.setdefault(occupant, []).append(index)
        several = [indices for indices in steps_of.values() if len(indices) > 1]
        return [(self._ends[indices[-1]] - self._ends[indices[0]]) / (len(indices) - 1) for indices in several]


class Jaxserve:
    """jaxserve's `Engine.generate`."""

    def load(self, settings: Settings) -> dict[str, Any]:
        """Loads and compiles.

        Args:
          settings: `options` has the fields of EngineConfig, a seed, a folder for compiled programs and a file for a timeline.
        """
        options = settings.options
        self._timeline_path = options.get("timeline")
        if options.get("compilation_cache_dir"):
            jax.config.update(
                "jax_compilation_cache_dir", str(pathlib.Path(options["compilation_cache_dir"]).expanduser())
            )
        jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
        base_bytes = resident_bytes()
        self._model = families.read_model_config(settings.model)
        self._dtype = settings.dtype
        if settings.model.endswith(".json"):
            params = random_params(self._model, options["seed"], settings.dtype)
        else:
            params = checkpoint.load_hugging_face(settings.model, self._model, dtype=settings.dtype)
        config = resolve_capacities(EngineConfig.from_dict(options["config"]), self._model, params)
        # Prepared here, as `Engine.from_pretrained` does, so that the unprepared weights are freed.
        params = prepare_and_free(params, self._model, config.backend, config.weight_dtype)
        weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        engine = self._engine = Engine(params, self._model, config)
        del params
        engine.warm_up()
        load_peak_bytes = peak_bytes()
        forget_peak()
        page_bytes = bytes_per_page(self._model, engine.config.page_size, str(engine.config.kv_dtype))
        return {
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__},
            "max_slots": engine.config.max_slots,
            "num_pages": engine.config.num_pages,
            "page_size": engine.config.page_size,
            "max_model_len": engine.config.max_sequence_len,
            "chunk_size": engine.config.chunk_size,
            "tile_rows": engine.config.tile_rows,
            "max_steps_per_call": engine.config.max_steps_per_call,
            "attention_backend": engine.config.attention_backend,
            "compile_seconds": engine.stats.compile_seconds,
            "weights_bytes": weights_bytes,
            "pool_bytes": (engine.config.num_pages or 0) * page_bytes,
            "base_bytes": base_bytes,
            "load_peak_bytes": load_peak_bytes,
        }

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        engine, params = self._engine, Workload(list(prompts), list(output_lengths)).params
        engine.reset_stats()
        clock = StepClock(engine.config)
        engine.observer = clock.observe
        start = time.perf_counter()
        results = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        engine.observer = None
        if self._timeline_path is not None:
            save_timeline(clock.timeline, self._timeline_path)  # each round replaces the one before
        stats, steps = engine.stats, clock.timeline.steps()
        work = work_of_steps(steps, self._model, self._dtype, self._engine.config.weight_dtype)
        rows = steps.num_new.sum(axis=1)
        more = {
            "num_steps": stats.num_steps,
            "num_computed_tokens": stats.num_computed_tokens,
            "mean_occupancy": stats.mean_occupancy,
            "num_preemptions": stats.num_preemptions,
            "peak_pages": stats.peak_pages,
            "num_device_calls": stats.num_device_calls,
            "num_host_reads": stats.num_host_reads,
            "mean_rows": float(np.mean(rows)),
            "median_rows": statistics.median(rows.tolist()),
            "flops": work.flops.tolist(),
            "bytes": work.num_bytes.tolist(),
            "peak_bytes": peak_bytes(),
        }
        return Round(seconds, [list(r.outputs[0].token_ids) for r in results], clock.seconds_per_token() or None, more)


if __name__ == "__main__":
    serve(Jaxserve())
