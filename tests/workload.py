"""A tiny model and crowded workloads for it, run step by step with an eye on slots, chunks and preemptions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve import EngineConfig, ModelConfig, SamplingParams, Transformer
from jaxserve.core.make_submission import make_submission
from jaxserve.core.programs import programs
from jaxserve.core.scheduler import EngineState, Handles, Status, Submission, check_invariants, init_state, submit
from jaxserve.core.step import run

MODEL = ModelConfig("mistral", 128, 32, 64, 2, num_heads=4, num_kv_heads=2, head_dim=8, windows=(None, 24))
CONFIG = EngineConfig(
    max_slots=4,
    num_pages=20,  # four longest sequences would need 64
    page_size=8,
    max_model_len=128,  # two of the blocks in which keys are read
    chunk_size=20,
    max_queue=12,
    tile_rows=8,
    max_logprobs=3,
    max_steps_per_call=16,
    kv_dtype="float32",
)
BF16 = dataclasses.replace(CONFIG, kv_dtype="bfloat16")
MAX_NEW = 20


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, and the step before which it arrives."""

    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    arrival: int = 0


@dataclasses.dataclass
class Traced:
    """The results of a request, and its course. The first five fields must not depend on the neighbours."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[np.float32] = dataclasses.field(default_factory=list)
    ranks: list[int] = dataclasses.field(default_factory=list)
    top_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    top_logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    slots: list[int] = dataclasses.field(default_factory=list)  # per step that computed something
    chunks: list[int] = dataclasses.field(default_factory=list)  # tokens computed in each of these steps
    num_preemptions: int = 0
    status: Status = Status.WAITING


def make_params(dtype: Any = jnp.float32, seed: int = 0) -> nnx.State:
    """Random weights, large enough that generated text varies."""
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(seed)))[1]
    return jax.tree.map(lambda leaf: (leaf * 6 if leaf.ndim > 1 else leaf).astype(dtype), params)


def greedy(**changes: Any) -> SamplingParams:
    """Returns parameters of a greedy request for `MAX_NEW` tokens, with some fields changed."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": MAX_NEW, "logprobs": 3} | changes)


def make_prompt(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, MODEL.vocab_size, length).tolist())


def crowd(seed: int, number: int, *, plain: bool = False) -> list[Asked]:
    """Returns requests of all kinds and lengths; if `plain`, greedy ones without other parameters."""
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(number):
        kind = {} if plain or index % 4 == 0 else {"temperature": 1.3, "seed": int(rng.integers(2**63))}
        if kind and index % 4 == 1:
            kind |= {"top_p": 0.8, "logprobs": 3}
        if kind and index % 4 == 2:
            kind |= {"top_k": 7, "min_p": 0.01, "logprobs": 1}
        length, max_tokens = int(rng.integers(1, 80)), int(rng.integers(1, MAX_NEW + 1))
        params = greedy(**{"logprobs": None, "max_tokens": max_tokens} | kind)
        requests.append(Asked(make_prompt(rng, length), params))
    return requests


@functools.cache
def submit_program(config: EngineConfig) -> Callable[..., tuple[EngineState, Handles]]:
    return jax.jit(functools.partial(submit, model=MODEL, config=config))


@functools.cache
def run_program(config: EngineConfig) -> Callable[..., Any]:
    """`run` without donation: the states of these tests are kept and run again."""
    static = {"model": MODEL, "config": config, "max_new_tokens": MAX_NEW, "num_top_logprobs": 3}
    return jax.jit(functools.partial(run, **static))


def submission_of(requests: Sequence[Asked], config: EngineConfig) -> Submission:
    return make_submission(
        [request.prompt for request in requests],
        [request.params for request in requests],
        priorities=[request.priority for request in requests],
        model=MODEL,
        config=config,
        num_rows=config.queue_size,
    )


def start(requests: Sequence[Asked], config: EngineConfig) -> EngineState:
    """Returns a new state in which row i holds request i."""
    state, handles = submit_program(config)(init_state(MODEL, config), submission_of(requests, config))
    assert handles.row_id[: len(requests)].tolist() == list(range(len(requests)))
    return state


def trace(
    requests: Sequence[Asked],
    params: nnx.State,
    config: EngineConfig,
    *,
    after_step: Callable[[EngineState], EngineState] = lambda state: state,
) -> list[Traced]:
    """Runs the step program until nothing is left, checking the invariants after every step."""
    state, traced, rows, index = init_state(MODEL, config), [Traced() for _ in requests], {}, 0
    last_arrival = max(request.arrival for request in requests)
    while index <= last_arrival or has_unfinished(state):
        due = [i for i, request in enumerate(requests) if request.arrival == index]
        if due:
            state, handles = submit_program(config)(state, submission_of([requests[i] for i in due], config))
            rows |= dict(zip(handles.row_id.tolist(), due, strict=False))
        state, output = programs(MODEL, config)["step"](params, state)
        check_invariants(state)
        note(jax.device_get(output), rows, traced)
        state = after_step(state)
        index += 1
    for row, i in rows.items():
        traced[i].num_preemptions = int(state.queue.num_preemptions[row])
    return traced


def has_unfinished(state: EngineState) -> bool:
    return bool(np.isin(np.asarray(state.queue.status), (Status.WAITING, Status.RUNNING)).any())


def note(output: Any, rows: dict[int, int], traced: list[Traced]) -> None:
    """Adds the output of one step; `rows` maps queue rows to requests."""
    for slot, row in enumerate(output.row_id):
        if row not in rows or not output.num_new[slot]:
            continue
        seen = traced[rows[row]]
        seen.slots.append(slot)
        seen.chunks.append(int(output.num_new[slot]))
        seen.status = Status(output.status[slot])
        if output.sampled[slot]:
            seen.tokens.append(int(output.drawn.token[slot]))
            seen.logprobs.append(output.drawn.logprob[slot])
            seen.ranks.append(int(output.drawn.rank[slot]))
            seen.top_ids.append(output.drawn.top_ids[slot])
            seen.top_logprobs.append(output.drawn.top_logprobs[slot])


def assert_same(actual: Traced, expected: Traced) -> None:
    """Checks that tokens, logprobs and top lists are the same to the bit."""
    for name in ("tokens", "logprobs", "ranks", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    assert actual.status == expected.status


def assert_run_agrees(results: Any, row: int, expected: Traced) -> None:
    """Checks that `run` reports the same for a row as the steps."""
    length = len(expected.tokens)
    assert results.num_generated[row] == length
    assert results.status[row] == expected.status
    np.testing.assert_array_equal(results.token_ids[row, :length], expected.tokens)
    np.testing.assert_array_equal(results.logprobs[row, :length], expected.logprobs)
    np.testing.assert_array_equal(results.top_ids[row, :length], expected.top_ids)
    np.testing.assert_array_equal(results.top_logprobs[row, :length], expected.top_logprobs)
