"""Times steps from a given state again and again: with the model, and with a stub in its place.

Calls of n steps and calls of one step are timed in pairs (`lib/timing.py`). Before each timed call the state is set back, but
not its pool; so every call does the same work, and cases can share a pool. With the stub, a step is the scheduler alone:
aborts, admission, pages, plan, counts, advance, retire.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int32
from lib.device import free_bytes
from lib.random_pages import random_pages
from lib.timing import PairedTimes, Timing
from scaling.cases import Case

from jaxserve import EngineConfig, EngineState, ModelConfig, Status
from jaxserve.core.cache import KVPool, bytes_per_page, init_kv_pool
from jaxserve.core.cache.kv_pool import stores_bits
from jaxserve.core.programs import programs
from jaxserve.core.scheduler.token_counts import count_tokens
from jaxserve.core.scheduler.transitions import finish_step, samples, schedule

_MEMORY_SHARE = 0.8  # a pool may take this share of the free memory


def stub_steps(
    state: EngineState, num_steps: Int32[Array, ""], *, config: EngineConfig
) -> tuple[EngineState, Int32[Array, " S"]]:
    """Takes steps as `jaxserve.core.step` composes them, with made-up tokens in place of model and sampler.

    Returns:
      The state, and how many tokens each slot drew.
    """

    def step(carry: tuple[EngineState, Array]) -> tuple[EngineState, Array]:
        state, drawn = carry
        state, plan = schedule(state, config=config)
        sampled = samples(state, plan.num_new)
        state = count_tokens(state, sampled)
        row = jnp.where(sampled, state.slots.row_id, 0)
        # The token depends on the counts, as the sampler does. Otherwise XLA would copy all tokens of the queue, to count in
        # the copy while the original is written to.
        token = (state.queue.arrival[row] * 40503 + state.queue.num_tokens[row] + state.slots.num_counted) % 65521
        return finish_step(state, plan.num_new, token), drawn + sampled.astype(jnp.int32)

    drawn = jnp.zeros_like(state.slots.row_id)
    return lax.fori_loop(0, num_steps, lambda _, carry: step(carry), (state, drawn))


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that takes steps in one dispatch.

    Attributes:
      run: takes a state, which is donated, and the number of steps; returns the state and the outputs.
      count_drawn: takes the outputs and the number of steps; returns how many tokens each slot drew.
    """

    run: Callable[[EngineState, Any], tuple[EngineState, Any]]
    count_drawn: Callable[[Any, int], Any]


def stub_model(vocab_size: int) -> ModelConfig:
    """Returns a model for the scheduler, so small that its pool has room for any number of pages."""
    return ModelConfig("llama", vocab_size, 8, 8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)


def make_stub(config: EngineConfig) -> Program:
    """Makes the program of the scheduler alone."""
    run = jax.jit(functools.partial(stub_steps, config=config), donate_argnums=0)
    return Program(run, lambda drawn, _: np.asarray(drawn))


def make_step(params: nnx.State, model: ModelConfig, config: EngineConfig) -> Program:
    """Makes the engine's own program; prepare `params` first, otherwise each call prepares them."""
    run = functools.partial(programs(model, config)["run_steps"], params)
    return Program(run, lambda outputs, n: np.sum(np.asarray(outputs.steps.sampled[:n]), axis=0, dtype=np.int32))


class Pools:
    """Pools of random keys and values: cases with the same number of pages share one."""

    def __init__(self) -> None:
        self._pools: dict[int, KVPool] = {}

    def take(self, model: ModelConfig, config: EngineConfig) -> KVPool:
        """Hands out a pool, which must be given back.

        Raises:
          ValueError: if the pool does not fit into the free memory.
        """
        num_pages = config.num_pages or 0
        return self._pools.pop(num_pages) if num_pages in self._pools else _random_pool(model, config, num_pages)

    def give_back(self, pool: KVPool) -> None:
        """Takes a pool back for the next case."""
        self._pools[pool.k[0].shape[0]] = pool


def _random_pool(model: ModelConfig, config: EngineConfig, num_pages: int) -> KVPool:
    dtype = str(config.kv_dtype)
    needed, free = num_pages * bytes_per_page(model, config.page_size, dtype), free_bytes()
    if needed > _MEMORY_SHARE * free:
        raise ValueError(
            f"the KV pool takes {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free: lower --slots, --context or "
            "--points"
        )
    as_bits = stores_bits(config.backend)
    shapes = jax.eval_shape(lambda: init_kv_pool(model, num_pages, config.page_size, dtype, as_bits=as_bits))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pages = [random_pages(key, leaf.shape, str(leaf.dtype)) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, pages)


class Bench:
    """Times the steps of one case; the constructor compiles them and checks their results.

    Args:
      case: sizes of the state, and the expected behaviour of the steps.
      config: the engine's configuration for the case.
      state: the state in which every timed call starts; its pool is None.
      program: the program that takes the steps.
      num_steps: steps of the longer call.
      model: hyperparameters, for the pool; None: the program needs no pool.
      pools: the pools to take one from; None: the program needs no pool.

    Raises:
      ValueError: if the pool does not fit.
      RuntimeError: if the steps do not do what the case says.
    """

    def __init__(
        self,
        case: Case,
        config: EngineConfig,
        state: EngineState,
        program: Program,
        num_steps: int,
        *,
        model: ModelConfig | None = None,
        pools: Pools | None = None,
    ) -> None:
        self.case, self.config = case, config
        self._program, self._num_steps, self._model, self._pools = program, num_steps, model, pools
        self._seen, self._saved = state.seen, state.replace(seen=None)
        self._times = PairedTimes(num_steps)
        self._timed(1)
        self._timed(num_steps)

    def take_sample(self) -> None:
        """Times a call of one step and a call of many."""
        one = self._timed(1)
        self._times.add(one, self._timed(self._num_steps))

    def timing(self) -> Timing:
        """Returns the times of a step that the samples so far give."""
        return self._times.timing()

    def _timed(self, num_steps: int) -> float:
        pool = None if self._model is None or self._pools is None else self._pools.take(self._model, self.config)
        state = jax.tree.map(jnp.copy, self._saved).replace(pool=pool, seen=self._seen)
        state, steps = jax.block_until_ready((state, np.int32(num_steps)))
        begin = time.perf_counter()
        state, outcome = jax.block_until_ready(self._program.run(state, steps))
        seconds = time.perf_counter() - begin
        self._seen = state.seen
        if self._pools is not None and pool is not None:
            self._pools.give_back(state.pool)
        self._check(state, self._program.count_drawn(outcome, num_steps), num_steps)
        return seconds

    def _check(self, state: EngineState, drawn: Int32[np.ndarray, " S"], num_steps: int) -> None:
        finished = int(np.sum(np.asarray(state.queue.status) >= Status.STOP))
        busy = np.arange(self.case.slots) < len(self.case.lengths)
        if not np.array_equal(drawn, np.where(busy, num_steps, 0)) or finished != self.case.turnover * num_steps:
            raise RuntimeError(
                f"{self.case.sweep} {self.case.value}: in {num_steps} steps the slots drew {sorted(set(drawn.tolist()))} "
                f"tokens each and {finished} sequences ended, not {self.case.turnover} per step"
            )
