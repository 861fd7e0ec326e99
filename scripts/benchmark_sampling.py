"""Measures the cost of each sampling parameter per step: the sampler alone, on random logits, in one compiled program.

    python scripts/benchmark_sampling.py --rows 32 --vocab_size 151936 --json sampling.jsonl

"nothing asked" is a step of greedy rows, so it has the cost of all parameters that no row asks for. The line above it is the
least that any sampler does: argmax and log-sum-exp, as XLA computes them. In each other line every row asks for the same
parameters; "added" is the time above that of "nothing asked". Times are medians in milliseconds; the parameters take turns.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from lib.command import run_command
from lib.flag_values import options_from_flags
from lib.records import Record, outputs, provenance
from lib.table import Table

from jaxserve import EngineConfig, ModelConfig, SamplingParams, init_state
from jaxserve.core.logit_rules import Context
from jaxserve.core.make_submission import empty_submission, fill_row
from jaxserve.core.sampling import sample
from jaxserve.core.scheduler import EngineState
from jaxserve.core.scheduler.token_counts import count_tokens
from pallas_kernels.backend import resolve_backend

FEATURES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "temperature, top_k": {"temperature": 1.0, "top_k": 50},
    "temperature, top_p": {"temperature": 1.0, "top_p": 0.9},
    "temperature, min_p": {"temperature": 1.0, "min_p": 0.05},
    "logprobs": {"logprobs": 20},
    "logprobs, processed": {"logprobs": 20, "logprobs_mode": "processed"},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": dict.fromkeys(range(32), 1.0)},
    "allowed_token_ids": {"allowed_token_ids": range(200)},
    "bad_words": {"bad_words": [[5, 6], [7]]},
    "min_tokens": {"min_tokens": 16},
}
_METHOD = "the sampler alone on random logits; parameters in turns, after an untimed call of each; medians and minima"
_COLUMNS = {"asked for": 24, "ms/step": 9, "min ms": 9, "added ms": 9}
_ROOM = 16  # tokens that a sequence may still generate


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    rows: int
    vocab_size: int
    sequence_length: int
    repeats: int
    sampler: str
    json: str | None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_integer("rows", 32, "Sequences that draw a token in a step.", lower_bound=1, **to)
    flags.DEFINE_integer("vocab_size", 151_936, "Tokens in the vocabulary.", lower_bound=300, **to)
    flags.DEFINE_integer("sequence_length", 512, "Tokens of each sequence.", lower_bound=16, **to)
    flags.DEFINE_integer("repeats", 15, "Timed calls per parameter.", lower_bound=1, **to)
    flags.DEFINE_enum(
        "sampler", None, ["native", "plain"], "C++ kernels or plain JAX; by default what an engine uses here.", **to
    )
    flags.DEFINE_string("json", None, "Write the records as JSON lines to this file.", **to)


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags."""
    usual = "native" if resolve_backend(None) == "native" else "plain"
    return options_from_flags(Options, values, sampler=values.sampler or usual)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A state in which every row asks for the same parameters, and the part of it that the sampler gets."""

    state: EngineState
    context: Context


def make_setting(model: ModelConfig, config: EngineConfig, length: int, **fields: Any) -> Setting:
    """Makes a setting in which every row decodes its `length`-th token, with all tokens before it counted.

    Args:
      model: hyperparameters.
      config: the engine's configuration.
      length: tokens of each sequence.
      fields: fields of SamplingParams; greedy by default.
    """
    num_rows = config.max_slots
    submission = empty_submission(num_rows, model, config)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": _ROOM} | fields)
    for row in range(num_rows):
        tokens = np.random.default_rng(row).integers(0, model.vocab_size, length - 8)
        fill_row(submission, row, tokens.tolist(), params, seed=row, priority=0, eos_token_ids=(3,))
    state = init_state(model, config)
    num_tokens = jnp.full((num_rows,), length, jnp.int32)
    queue = state.queue.replace(
        tokens=state.queue.tokens.at[:].set(submission.tokens),
        prompt_length=num_tokens - 8,
        num_tokens=num_tokens,
        stop_token_ids=jnp.asarray(submission.stop_token_ids),
        sampling=jax.tree.map(jnp.asarray, submission.sampling),
        rules=jax.tree.map(jnp.asarray, submission.rules),
    )
    slots = state.slots.replace(row_id=jnp.arange(num_rows, dtype=jnp.int32))
    state = count_tokens(state.replace(queue=queue, slots=slots), jnp.ones((num_rows,), bool))
    # A step counts one token itself, so the state counts one token less than the sequences have.
    state = state.replace(slots=state.slots.replace(num_counted=jnp.maximum(state.slots.num_counted - 1, 0)))
    return Setting(
        state=state,
        context=Context(
            tokens=queue.tokens,
            num_tokens=queue.num_tokens,
            prompt_length=queue.prompt_length,
            stop_token_ids=queue.stop_token_ids,
            slot=slots.row_id,
            seen=None,
        ),
    )


def one_step(logits: jax.Array, state: EngineState, context: Context, *, max_logprobs: int, native: bool) -> Any:
    """Does the part of a step after the output projection, without retiring; returns the drawn tokens and the state."""
    rows = jnp.ones(context.num_tokens.shape, bool)
    state = count_tokens(state, rows)
    queue = state.queue
    context = context.replace(seen=state.seen)
    options: dict[str, Any] = {"max_logprobs": max_logprobs, "native": native}
    drawn = sample(logits, queue.sampling, queue.rules, context, rows, **options)
    return drawn, state


def argmax_and_log_sum_exp(logits: jax.Array) -> Any:
    """Computes the least that any sampler needs."""
    return jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)


def measure(options: Options) -> list[Record]:
    """Times each parameter and returns a record for each, in milliseconds."""
    longest = options.sequence_length + _ROOM
    model = ModelConfig("llama", options.vocab_size, 8, 8, 1, 1, 1, 8, max_position=longest)
    config = EngineConfig(
        max_slots=options.rows,
        max_queue=options.rows,
        num_pages=-(-longest // 16),
        max_model_len=longest,
        kv_dtype="float32",
    )
    logits = 3 * jax.random.normal(jax.random.key(0), (options.rows, options.vocab_size))
    static: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": options.sampler == "native"}
    program = jax.jit(functools.partial(one_step, **static), donate_argnums=1)
    least = jax.jit(argmax_and_log_sum_exp)
    calls: dict[str, Callable[[], float]] = {"argmax and log-sum-exp": lambda: _seconds(least, logits)}
    for name, fields in {"nothing asked": {}, **FEATURES}.items():
        setting = make_setting(model, config, options.sequence_length, **fields)
        calls[name] = functools.partial(_step_seconds, program, logits, setting)
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        for name, call in calls.items():
            seconds = call()
            if repeat:  # the first call compiles
                times_ms[name].append(1e3 * seconds)
    unused = statistics.median(times_ms["nothing asked"])
    return [
        {
            "feature": name,
            "median_ms": round(statistics.median(samples), 3),
            "min_ms": round(min(samples), 3),
            "added_ms": round(statistics.median(samples) - unused, 3),
        }
        for name, samples in times_ms.items()
    ]


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def _step_seconds(program: Callable[..., Any], logits: jax.Array, setting: Setting) -> float:
    state = jax.block_until_ready(jax.tree.map(jnp.copy, setting.state))
    return _seconds(program, logits, state, setting.context)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _run(parse_options(values)))


def _run(options: Options) -> int:
    common = {
        "rows": options.rows,
        "vocab_size": options.vocab_size,
        "repeats": options.repeats,
        "sampler": options.sampler,
        **provenance(_METHOD, seed=0),
    }
    with outputs(None, options.json, lambda: common) as write:
        print(
            f"{common['device']}, jax {jax.__version__}: {options.sampler} sampler, {options.rows} rows, vocabulary "
            f"{options.vocab_size}; milliseconds per step, medians of {options.repeats}"
        )
        table = Table(_COLUMNS)
        for record in measure(options):
            write(record)
            times = {"ms/step": record["median_ms"], "min ms": record["min_ms"]}
            more = record["added_ms"] if record["feature"] in FEATURES else None
            table.print_row({"asked for": record["feature"], **times, "added ms": more})
    return 0


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
