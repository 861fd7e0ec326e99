"""Measures the demo model against a Kneser-Ney 5-gram over the same tokens and the same training files.

    python scripts/evaluate_demo_model.py --work_dir=../demo_work --out=scripts/results/demo_model.json

Bits per byte cover all held-out files, with `<|endoftext|>` before each. The 5-gram reads the held-out tokens as one sequence.
The model reads windows of its context that overlap by half. Each token is scored once, in the first window that holds it, so it
has at least half a context before it (except in the first window).

`demo/completions.py` explains how completions are judged.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from demo import completions as demo_completions
from demo import corpus as demo_corpus
from demo import kneser_ney
from demo import model as demo_model
from demo import tokenizer as demo_tokenizer

from jaxserve.models import Transformer

NGRAM_ORDER = 5
_WINDOWS_AT_ONCE = 4


def ngram_bits(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Returns the bits of the held-out tokens after the first `NGRAM_ORDER - 1`."""
    return kneser_ney.bits(kneser_ney.fit(train, NGRAM_ORDER, vocab_size), heldout)


def model_bits(model: Transformer, tokens: np.ndarray) -> float:
    """Returns the bits of the tokens after the first, under the model."""
    context = model.config.max_position
    windows, first_scored = overlapping_windows(tokens, context)

    @jax.jit
    def score(inputs, targets):
        logits = model.logits(demo_model.hidden_states(model, inputs)).reshape(*inputs.shape, -1)
        scores = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]

    total = 0.0
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        part = windows[start : start + _WINDOWS_AT_ONCE]
        scores = np.asarray(score(part[:, :-1], part[:, 1:]), np.float64)
        counted = np.arange(context)[None, :] >= first_scored[start : start + _WINDOWS_AT_ONCE, None]
        total -= scores[counted].sum() / math.log(2)
    return total


def overlapping_windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows [N, context + 1] every half context, the last one up to the end, and where each starts to count.

    tokens 0 1 2 3 4 5 6 7 8, context 4: windows at 0, 2, 4 scoring targets 1-4, 5-6, 7-8
    """
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens do not fill one window of {context + 1}: give more held-out text")
    starts = list(range(0, len(tokens) - context, context // 2))
    if starts[-1] + context + 1 < len(tokens):
        starts.append(len(tokens) - context - 1)
    ends = [0, *(start + context for start in starts[:-1])]
    windows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int32)
    return windows, np.array([end - start for start, end in zip(starts, ends, strict=True)])


def measure_bits(work_dir: pathlib.Path, model_dir: pathlib.Path) -> dict[str, float]:
    """Returns the bits per byte of the held-out files, by the 5-gram and by the model."""
    heldout = np.load(work_dir / "heldout.npy")
    num_bytes = json.loads((work_dir / "sizes.json").read_text())["heldout"]
    ngram = ngram_bits(np.load(work_dir / "train.npy"), heldout, demo_tokenizer.VOCAB_SIZE) / num_bytes
    logging.info("Kneser-Ney %d-gram: %.4f bits per byte", NGRAM_ORDER, ngram)
    model = model_bits(demo_model.load(model_dir), heldout) / num_bytes
    logging.info("model: %.4f bits per byte, %.1f%% fewer", model, 100 * (1 - model / ngram))
    return {
        "heldout_bytes": num_bytes,
        "heldout_tokens": len(heldout),
        "ngram_bits_per_byte": round(ngram, 4),
        "model_bits_per_byte": round(model, 4),
        "fewer_bits_percent": round(100 * (1 - model / ngram), 2),
    }


def measure_completions(
    work_dir: pathlib.Path, model_dir: pathlib.Path, num_prompts: int, temperature: float
) -> dict[str, object]:
    """Returns how many held-out completions parse, and quotes some."""
    sources = demo_corpus.load(work_dir / "heldout.jsonl")
    prompts = demo_completions.prompts(sources, demo_tokenizer.load(model_dir), num_prompts)
    completions = demo_completions.generate(model_dir, prompts, temperature=temperature)
    return {"temperature": temperature, **demo_completions.report(prompts, completions)}


def main(_) -> None:
    work_dir, model_dir, out = map(pathlib.Path, (WORK_DIR.value, MODEL_DIR.value, OUT_FILE.value))
    results = json.loads(out.read_text()) if out.exists() else {}
    if BITS.value:
        results["bits"] = measure_bits(work_dir, model_dir)
    if NUM_COMPLETIONS.value:
        results["completions"] = measure_completions(work_dir, model_dir, NUM_COMPLETIONS.value, TEMPERATURE.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder of the corpus and the tokens.", required=True)
    MODEL_DIR = flags.DEFINE_string("model_dir", "jaxserve/demo_model", "Folder of the exported model.")
    OUT_FILE = flags.DEFINE_string("out", "scripts/results/demo_model.json", "Write the results to this file.")
    BITS = flags.DEFINE_bool("bits", True, "Measure bits per byte; if not, keep those of the file.")
    NUM_COMPLETIONS = flags.DEFINE_integer(
        "num_completions", 200, "Number of held-out completions; 0 keeps those of the file."
    )
    TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Temperature of the completions; 0 is greedy.")
    app.run(main)
