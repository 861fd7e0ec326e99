"""Times the engine's step on random weights: all slots decoding, and the prefill of one long prompt.

Decoding starts in the state of a long-running service: the prompts are admitted, and their keys and values are random numbers
instead of computed ones, so that filling hundreds of slots takes no time. Then every step draws one token in every slot, which
is checked.
"""

import dataclasses
import time

import jax
import numpy as np
from flax import nnx
from lib.device import free_bytes
from lib.random_pages import random_pages
from lib.timing import PairedTimes, Timing

from jaxserve import EngineConfig, EngineState, ModelConfig, SamplingParams, StepOutputs, init_state, make_submission
from jaxserve.core.cache import bytes_per_page
from jaxserve.core.programs import Changes, programs

_PREFILL_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One engine in one state.

    Attributes:
      model: hyperparameters.
      slots: number of slots, all of which decode.
      context: tokens per sequence in the middle of the measurement, and tokens of the prompt whose prefill is timed.
      num_steps: steps per timed call.
      repeats: number of timed calls.
      engine: its configuration, in which slots, lengths, pages, queue and steps per call are replaced.
    """

    model: ModelConfig
    slots: int
    context: int
    num_steps: int
    repeats: int
    engine: EngineConfig

    @property
    def total_steps(self) -> int:
        """The number of steps that run, including those that warm up."""
        return 1 + (self.repeats + 1) * (1 + self.num_steps)

    @property
    def prompt_length(self) -> int:
        return self.context - self.total_steps // 2

    @property
    def mean_tokens(self) -> float:
        """The positions that a batch row sees, on average over the timed steps."""
        warm = 1 + (1 + self.num_steps)
        return self.prompt_length + (warm + self.total_steps - 1) / 2

    def config(self) -> EngineConfig:
        """Returns the configuration of the engine.

        Raises:
          ValueError: if the context is too short for the steps, or too long for the model.
        """
        if self.prompt_length < 1:
            raise ValueError(
                f"--context={self.context} is too short for {self.total_steps} steps: raise it, or lower --steps or --repeats"
            )
        longest = max(self.prompt_length + self.total_steps, self.context) + 2
        if longest > self.model.max_position:
            raise ValueError(
                f"--context={self.context} takes {longest} positions with the steps, but the model was made for "
                f"{self.model.max_position}: lower it"
            )
        config = dataclasses.replace(
            self.engine,
            max_slots=self.slots,
            num_pages=None,
            max_model_len=longest,
            max_queue=self.slots,
            max_steps_per_call=max(self.num_steps, -(-self.context // self.engine.chunk_size)),
        )
        return dataclasses.replace(config, num_pages=self.slots * (config.pages_per_slot + 1))


class StepBench:
    """The compiled programs of one case.

    Raises:
      ValueError: if `StepCase.config` raises it, or the pool does not fit.
    """

    def __init__(self, case: StepCase, params: nnx.State) -> None:
        self.case, self.params, self.config = case, params, case.config()
        page_bytes = bytes_per_page(case.model, self.config.page_size, str(self.config.kv_dtype))
        self.pool_bytes = (self.config.num_pages or 0) * page_bytes
        if self.pool_bytes > free_bytes():
            raise ValueError(
                f"the KV pool takes {self.pool_bytes / 2**30:.1f} GiB, but {free_bytes() / 2**30:.1f} GiB are free: lower "
                "--slots or --context"
            )
        self._programs = programs(case.model, self.config)

    def decode(self) -> Timing:
        """Times the step in which every slot decodes.

        Raises:
          RuntimeError: if a slot does not decode in every step.
        """
        case = self.case
        state = self._submitted(case.slots, case.prompt_length, case.total_steps + 1)
        state, outputs = self._run(state, 1)
        if (np.asarray(outputs.steps.row_id[0]) >= self.config.queue_size).any():
            raise RuntimeError("not all sequences were admitted in the first step")
        state = self._as_if_prefilled(state)
        state, _ = self._run(state, 1)
        times = PairedTimes(case.num_steps)
        for repeat in range(case.repeats + 1):  # the first one warms up
            state, one = self._timed(state, 1)
            state, many = self._timed(state, case.num_steps)
            if repeat:
                times.add(one, many)
        return times.timing()

    def prefill(self) -> float:
        """Returns the seconds from the submission of `context` tokens to the first new token, the median of 3."""
        seconds = []
        for _ in range(_PREFILL_REPEATS + 1):
            state = jax.block_until_ready(self._submitted(1, self.case.context, 1))
            begin = time.perf_counter()
            state, outputs = self._run(state, self.config.max_steps_per_call)
            seconds.append(time.perf_counter() - begin)
            if not np.asarray(outputs.steps.sampled[int(outputs.num_steps) - 1]).any():
                raise RuntimeError("the prompt was not prefilled in one call")
            del state  # before the next pool is made
        return float(np.median(seconds[1:]))

    def _submitted(self, num_prompts: int, length: int, max_tokens: int) -> EngineState:
        model, config = self.case.model, self.config
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, model.vocab_size, (num_prompts, length)).tolist()
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        rows = make_submission(prompts, params, model=model, config=config, num_rows=config.max_slots)
        none = np.zeros(config.queue_size, bool)
        changes = Changes(
            submission=rows, collected=none, aborted=none, generation=np.zeros(config.queue_size, np.int32)
        )
        return self._programs["update"](init_state(model, config), changes)[0]

    def _as_if_prefilled(self, state: EngineState) -> EngineState:
        pages = jax.tree.leaves(state.pool)
        filled = []
        for key, page in zip(jax.random.split(jax.random.key(0), len(pages)), pages, strict=True):
            shape, dtype = page.shape, str(page.dtype)
            page.delete()  # there may be no room for two pools
            filled.append(random_pages(key, shape, dtype))
        num_computed = state.queue.num_tokens[state.slots.row_id] - 1
        pool = jax.tree.unflatten(jax.tree.structure(state.pool), filled)
        return state.replace(pool=pool, slots=state.slots.replace(num_computed=num_computed))

    def _run(self, state: EngineState, num_steps: int) -> tuple[EngineState, StepOutputs]:
        return jax.block_until_ready(self._programs["run_steps"](self.params, state, np.int32(num_steps)))

    def _timed(self, state: EngineState, num_steps: int) -> tuple[EngineState, float]:
        begin = time.perf_counter()
        state, outputs = self._run(state, num_steps)
        seconds = time.perf_counter() - begin
        if int(outputs.num_steps) != num_steps or not np.asarray(outputs.steps.sampled[:num_steps]).all():
            raise RuntimeError("a slot did not decode in a timed step")
        return state, seconds
