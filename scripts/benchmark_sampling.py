"""What each sampling parameter costs per step: the sampler alone, on random logits, all features in one compiled program.

    python scripts/benchmark_sampling.py --rows 32 --vocab_size 151936 --json sampling.jsonl

"nothing asked" is the cost of all features when unused: greedy rows; the line above it is what no sampler can do without,
argmax and log-sum-exp. Each other line is what one feature adds when every row asks for it. Contenders take turns; medians.
"""

import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxserve import EngineConfig, ModelConfig, SamplingParams, init_state
from jaxserve.core.logit_rules import Context
from jaxserve.core.make_submission import empty_submission, fill_row
from jaxserve.core.sampling import sample
from jaxserve.core.scheduler import EngineState
from jaxserve.core.scheduler.token_counts import count_tokens
from pallas_kernels.backend import resolve_backend

FLAGS = flags.FLAGS
flags.DEFINE_integer("rows", 32, "Sequences that draw a token in a step.", lower_bound=1)
flags.DEFINE_integer("vocab_size", 151_936, "Tokens in the vocabulary.", lower_bound=300)
flags.DEFINE_integer("sequence_length", 512, "Tokens of each sequence.", lower_bound=16)
flags.DEFINE_integer("repeats", 15, "Timed calls per feature.", lower_bound=1)
flags.DEFINE_enum(
    "sampler", None, ["native", "plain"], "C++ kernels or plain JAX; by default what an engine uses here."
)
flags.DEFINE_string("json", None, "Also write the results as JSON lines to this file.")

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


@dataclasses.dataclass(frozen=True)
class Setting:
    """The state in which every row asks for the same."""

    state: EngineState
    context: Context


def make_setting(model: ModelConfig, config: EngineConfig, **wanted: Any) -> Setting:
    """Every row decodes its `sequence_length`-th token, with all tokens before counted."""
    rows, length = config.max_slots, FLAGS.sequence_length
    submission = empty_submission(rows, model, config)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16} | wanted)
    for row in range(rows):
        tokens = np.random.default_rng(row).integers(0, model.vocab_size, length - 8)
        fill_row(submission, row, tokens.tolist(), params, seed=row, priority=0, eos_token_ids=(3,))
    state = init_state(model, config)
    number = jnp.full((rows,), length, jnp.int32)
    queue = state.queue.replace(
        tokens=state.queue.tokens.at[:].set(submission.tokens),
        prompt_length=number - 8,
        num_tokens=number,
        stop_token_ids=jnp.asarray(submission.stop_token_ids),
        sampling=jax.tree.map(jnp.asarray, submission.sampling),
        rules=jax.tree.map(jnp.asarray, submission.rules),
    )
    slots = state.slots.replace(row_id=jnp.arange(rows, dtype=jnp.int32))
    state = count_tokens(state.replace(queue=queue, slots=slots), jnp.ones((rows,), bool))
    # One token less is counted than there are: a step counts one.
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


def one_step(
    logits: jax.Array, setting_state: EngineState, context: Context, *, max_logprobs: int, native: bool
) -> Any:
    """What a step does after the output projection, but for the retiring; the state goes back to whoever donated it."""
    rows = jnp.ones(context.num_tokens.shape, bool)
    state = count_tokens(setting_state, rows)
    queue = state.queue
    context = context.replace(seen=state.seen)
    options: dict[str, Any] = {"max_logprobs": max_logprobs, "native": native}
    drawn = sample(logits, queue.sampling, queue.rules, context, rows, **options)
    return drawn, state


def sampler() -> str:
    """What samples."""
    return FLAGS.sampler or ("native" if resolve_backend(None) == "native" else "plain")


def least(logits: jax.Array) -> Any:
    """What any sampler has to do."""
    return jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)


def measure() -> list[dict[str, Any]]:
    """One record per feature, times in milliseconds."""
    model = ModelConfig("llama", FLAGS.vocab_size, 8, 8, 1, 1, 1, 8, max_position=FLAGS.sequence_length + 16)
    config = EngineConfig(
        max_slots=FLAGS.rows,
        max_queue=FLAGS.rows,
        num_pages=-(-(FLAGS.sequence_length + 16) // 16),
        max_model_len=FLAGS.sequence_length + 16,
        kv_dtype="float32",
    )
    logits = 3 * jax.random.normal(jax.random.key(0), (FLAGS.rows, FLAGS.vocab_size))
    options: dict[str, Any] = {"max_logprobs": config.max_logprobs, "native": sampler() == "native"}
    program = jax.jit(functools.partial(one_step, **options), donate_argnums=1)
    argmax_and_sum = jax.jit(least)
    calls: dict[str, Callable[[], float]] = {"argmax and log-sum-exp": lambda: _timed(argmax_and_sum, logits)}
    for name, wanted in {"nothing asked": {}, **FEATURES}.items():
        setting = make_setting(model, config, **wanted)
        calls[name] = functools.partial(_timed_step, program, logits, setting)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(FLAGS.repeats + 1):
        for name, call in calls.items():
            taken = call()
            if repeat:  # the first one compiles
                times[name].append(1e3 * taken)
    unused = statistics.median(times["nothing asked"])
    return [
        {
            "feature": name,
            "median_ms": round(statistics.median(taken), 3),
            "min_ms": round(min(taken), 3),
            "added_ms": round(statistics.median(taken) - unused, 3),
        }
        for name, taken in times.items()
    ]


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def _timed_step(program: Callable[..., Any], logits: jax.Array, setting: Setting) -> float:
    state = jax.block_until_ready(jax.tree.map(jnp.copy, setting.state))
    return _timed(program, logits, state, setting.context)


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, writes the records."""
    if argv[1:]:
        print(f"error: unexpected argument {argv[1]!r}: there are only flags", file=sys.stderr)
        return 1
    records = measure()
    device = jax.devices()[0].device_kind
    print(
        f"{FLAGS.rows} rows, vocabulary {FLAGS.vocab_size}, {device}, jax {jax.__version__}, {sampler()} sampler; ms per step"
    )
    for record in records:
        print(f"{record['feature']:24} {record['median_ms']:9.2f}  added {record['added_ms']:8.2f}")
    if FLAGS.json is not None:
        about = {
            "rows": FLAGS.rows,
            "vocab_size": FLAGS.vocab_size,
            "repeats": FLAGS.repeats,
            "sampler": sampler(),
            "device": device,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(about | record) + "\n" for record in records)
    return 0


if __name__ == "__main__":
    app.run(main)
