"""Parity with transformers in float32 through pages: prefill at once and in chunks, decode, and after preemption.

One run per case serves all of it: a chunk budget that short prompts fit into and long ones do not, and a pool so small that
sequences are preempted and resume. Every position's whole distribution is compared, by asking for V top logprobs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve import EngineConfig, SamplingParams, Status, init_state, make_submission, run, submit
from jaxserve.models.checkpoint.hugging_face import load_hugging_face
from jaxserve.models.families.hugging_face import read_model_config
from tests.models import zoo

TOLERANCE = 1e-4  # of the largest logit at a position: promise P5
TIE = 1e-5  # of the same: below it, which of two tokens is the largest is rounding
NUM_NEW = 12
LENGTHS = (1, 3, 17, 40, 5, 26, 33)
# Every family, group size, kind of rope and window, tied and untied; each case costs one compilation of the step.
CASES = (
    "llama-tied-group2-llama3",
    "llama-biases-group4-dim20-linear",
    "llama-biases-tied-group7-dim6-yarn",
    "mistral-window-group4-dim20",
    "mistral-window-group1-yarn-mscale",
    "qwen2-mixed-group2-yarn",
    "qwen3-mixed-group7-theta",
    "qwen3-biases-tied-group4-llama3",
)


@pytest.mark.parametrize("name", CASES)
def test_every_position_agrees_in_chunks_decode_and_after_preemption(name: str, zoo_references) -> None:
    reference = zoo_references(next(case for case in zoo.CASES if case.name == name))
    model = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    config = EngineConfig(
        max_slots=4,
        num_pages=8,
        page_size=8,
        max_model_len=56,
        chunk_size=10,
        max_queue=len(LENGTHS),
        tile_rows=8,
        max_logprobs=model.vocab_size,
        kv_dtype="float32",
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.vocab_size, length).tolist() for length in LENGTHS]
    wanted = SamplingParams(temperature=0, max_tokens=NUM_NEW, logprobs=model.vocab_size)
    submission = make_submission(prompts, wanted, model=model, config=config)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    def serve(params, submission):
        state, handles = submit(init_state(model, config), submission, model=model, config=config)
        loop = functools.partial(run, model=model, config=config, max_new_tokens=NUM_NEW)
        state, results = loop(params, state, num_top_logprobs=model.vocab_size)
        return handles, results, state.queue.num_preemptions

    handles, results, num_preemptions = jax.device_get(serve(params, submission))
    assert num_preemptions.sum() > 0
    num_ties = 0
    for row, prompt in zip(handles.row_id, prompts, strict=True):
        assert results.status[row] == Status.LENGTH and results.num_generated[row] == NUM_NEW
        tokens = results.token_ids[row]
        with torch.no_grad():
            logits = reference.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        logits = logits.double().numpy()
        scale = np.abs(logits).max(-1)
        normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = np.zeros_like(normalised)
        np.put_along_axis(own, results.top_ids[row], results.top_logprobs[row], axis=-1)
        assert np.all(np.abs(own - normalised).max(-1) <= TOLERANCE * scale)
        assert np.allclose(np.take_along_axis(own, tokens[:, None], -1)[:, 0], results.logprobs[row])
        best = logits.max(-1)
        chosen = np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
        num_ties += int(np.sum(chosen != best))
        assert np.all(best - chosen <= TIE * scale)
    print(f"{reference.case.name}: {num_ties} tokens differ where the reference's two best are within rounding")
