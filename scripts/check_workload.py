"""Serves one workload twice, with a whole pool and with a part of it, and compares the outputs to the token.

    python scripts/check_workload.py --model configs/models/llama-135m.json

48 requests by default, prompts of 16 to 128 tokens, outputs log-uniform from 16 to 256, greedy, random weights. The smaller
pool makes sequences lose their slots and resume; a request's tokens must not change. Prints one JSON line per run.
"""

import json
import resource
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from lib.command import run_command

from jaxserve import Engine, EngineConfig, RequestOutput, SamplingParams
from jaxserve.core.cache import bytes_per_page
from jaxserve.models.params import abstract_params

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "configs/models/llama-135m.json", "A config.json file; weights are random.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float16"], "Of weights, keys and values.")
flags.DEFINE_integer("num_requests", 48, "Requests.")
flags.DEFINE_integer("max_slots", 32, "Sequences that run at the same time.")
flags.DEFINE_integer("max_model_len", 384, "Longest sequence, tokens.")
flags.DEFINE_integer("page_size", 16, "Tokens per page.")
flags.DEFINE_integer("shortest_output", 16, "Tokens.")
flags.DEFINE_integer("longest_output", 256, "Tokens.")
flags.DEFINE_float("pool_share", 0.25, "Size of the smaller pool, as a share of what all slots can use.")
flags.DEFINE_string("compilation_cache_dir", None, "Keep compiled programs here.")
flags.DEFINE_integer("seed", 0, "Of the workload and the weights.")


def make_workload(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters from the flags."""
    rng = np.random.default_rng(FLAGS.seed)
    lengths = rng.integers(16, 129, FLAGS.num_requests)
    bounds = np.log([FLAGS.shortest_output, FLAGS.longest_output])
    outputs = np.exp(rng.uniform(*bounds, FLAGS.num_requests)).astype(int)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    return prompts, [SamplingParams(temperature=0, max_tokens=int(output), ignore_eos=True) for output in outputs]


def serve(num_pages: int) -> list[RequestOutput]:
    """Serves the workload with a pool of `num_pages`; prints what it took."""
    config = EngineConfig(
        max_slots=FLAGS.max_slots,
        max_model_len=FLAGS.max_model_len,
        page_size=FLAGS.page_size,
        num_pages=num_pages,
    )
    engine = Engine.from_pretrained(FLAGS.model, dtype=FLAGS.dtype, config=config, load_format="dummy", seed=FLAGS.seed)
    before_bytes = _peak_bytes()
    engine.warm_up()
    prompts, params = make_workload(engine.model.vocab_size)
    start = time.perf_counter()
    results = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    stats = engine.stats
    weights = jax.tree.leaves(abstract_params(engine.model, FLAGS.dtype))
    weights_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    record = {
        "num_pages": num_pages,
        "requests": stats.num_requests,
        "prompt_tokens": stats.num_prompt_tokens,
        "generated_tokens": stats.num_generated_tokens,
        "computed_tokens": stats.num_computed_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(stats.num_generated_tokens / seconds, 1),
        "steps": stats.num_steps,
        "ms_per_step": round(1e3 * seconds / stats.num_steps, 1),
        "mean_occupancy": round(stats.mean_occupancy, 3),
        "preemptions": stats.num_preemptions,
        "peak_pages": stats.peak_pages,
        "warm_up_seconds": round(stats.compile_seconds, 1),
        "weights_mb": round(weights_bytes / 1e6, 1),
        "pool_mb": round(num_pages * bytes_per_page(engine.model, FLAGS.page_size, FLAGS.dtype) / 1e6, 1),
        "peak_rss_mb_before_warm_up": round(before_bytes / 1e6, 1),
        "peak_rss_mb": round(_peak_bytes() / 1e6, 1),
        "jax": jax.__version__,
    }
    print(json.dumps(record), flush=True)
    return results


def main(argv: Sequence[str]) -> int:
    """Runs both; returns 1 if any output differs, or if the smaller pool caused no preemption."""
    return run_command(argv, _compare)


def _compare() -> int:
    if FLAGS.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", FLAGS.compilation_cache_dir)
    whole = FLAGS.max_slots * -(-FLAGS.max_model_len // FLAGS.page_size)
    expected = serve(whole)
    results = serve(int(whole * FLAGS.pool_share))
    pairs = zip(expected, results, strict=True)
    differing = [one.request_id for one, other in pairs if one.outputs[0].token_ids != other.outputs[0].token_ids]
    preempted = sum(result.metrics.num_preemptions for result in results if result.metrics is not None)
    print(json.dumps({"requests_that_differ": len(differing), "preemptions": preempted}))
    return 1 if differing or not preempted else 0


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    app.run(main)
