"""Beam search equals that of transformers in float32: the same hypotheses in the same order, with the same scores.

One program per model and width serves all of it: penalties, stop rules and end-of-sequence ids are data. Ours searches prompts
of different lengths together; transformers gets them one by one.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve import BeamParams, EngineConfig, beam_search, make_beam_rules
from jaxserve.core.beam_search import BeamRules, Hypotheses, pages
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.models.checkpoint.hugging_face import load_hugging_face
from jaxserve.models.families.hugging_face import read_model_config
from tests.models import zoo

TOLERANCE = 1e-4  # of scores
TIE = 1e-5  # of scores: below it, which of two hypotheses is better is rounding
NUM_NEW = 14
CAPACITY = 24
PENALTIES = (0.0, 0.5, 1.0, 2.0, -1.0)
EARLY_STOPPING = (False, True, "never")
CONFIG = EngineConfig(
    max_slots=16, page_size=8, max_model_len=64, kv_dtype="float32", tile_rows=16, max_stop_token_ids=2
)
CASES = ("llama-tied-group2-llama3", "qwen3-mixed-group7-theta")  # the latter with a window


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """For so small a model more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Search:
    """Both implementations for one model and width."""

    reference: torch.nn.Module
    program: Callable[..., Hypotheses]  # of token ids, lengths and rules
    make_rules: Callable[..., BeamRules]
    vocab_size: int


def make_search(reference, width: int) -> Search:
    model = read_model_config(reference.directory)
    params = load_hugging_face(reference.directory, dtype=jnp.float32)
    search = functools.partial(beam_search, model=model, config=CONFIG, width=width)
    compiled = jax.jit(search, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    rules = functools.partial(make_beam_rules, model=model, config=CONFIG)
    return Search(reference.model, functools.partial(compiled, params), rules, model.vocab_size)


def case(name: str) -> zoo.Case:
    return next(case for case in zoo.CASES if case.name == name)


def make_prompts(seed: int, vocab_size: int) -> list[list[int]]:
    """Four, of lengths at, before and after the edge of a page, and any."""
    rng = np.random.default_rng(seed)
    lengths = (int(rng.integers(1, 4)), 8 + seed % 2, int(rng.integers(10, 16)), int(rng.integers(16, CAPACITY + 1)))
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def ours(search: Search, prompts: Sequence[Sequence[int]], beams: BeamParams) -> Hypotheses:
    rows, lengths = np.zeros((len(prompts), CAPACITY), np.int32), np.array(list(map(len, prompts)), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jax.device_get(search.program(rows, lengths, search.make_rules(beams, lengths)))


def theirs(search: Search, prompt: Sequence[int], beams: BeamParams) -> list[tuple[list[int], float]]:
    """Tokens and score of each hypothesis, best first."""
    with torch.no_grad():
        found = search.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=beams.width,
            do_sample=False,
            num_return_sequences=beams.width,
            max_new_tokens=beams.max_tokens,
            eos_token_id=list(beams.eos_token_ids or ()) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **({} if beams.width == 1 else _options(beams)),
        )
    generated = found.sequences[:, len(prompt) :].tolist()
    if beams.width > 1:
        lengths = (found.beam_indices >= 0).sum(1).tolist()
        pairs = zip(generated, lengths, found.sequences_scores.tolist(), strict=True)
        return [(tokens[:length], score) for tokens, length, score in pairs]
    logprobs = [float(torch.log_softmax(s[0], -1)[t]) for s, t in zip(found.scores, generated[0], strict=True)]
    return [(generated[0], sum(logprobs) / len(logprobs) ** beams.length_penalty)]


def _options(beams: BeamParams) -> dict:
    return {"length_penalty": beams.length_penalty, "early_stopping": beams.early_stopping}


def end_of_sequence(found: Hypotheses) -> tuple[int, ...]:
    """Two ids that the model does produce: one early in the best hypothesis of a prompt, one later in another's."""
    return tuple(dict.fromkeys((int(found.tokens[0, 0, 4]), int(found.tokens[2, -1, 7]))))


def compare(search: Search, prompts: Sequence[Sequence[int]], beams: BeamParams) -> tuple[int, int, int]:
    """Numbers of hypotheses that are equal and ended, equal and cut off, and different within rounding."""
    found = ours(search, prompts, beams)
    num_ended = num_cut = num_ties = 0
    for row, prompt in enumerate(prompts):
        for rank, (tokens, score) in enumerate(theirs(search, prompt, beams)):
            assert found.valid[row, rank]
            own = found.tokens[row, rank, : found.length[row, rank]].tolist()
            difference = abs(found.score[row, rank] - score)
            scale = max(1, len(tokens) ** -beams.length_penalty)  # a negative penalty multiplies what rounding makes
            assert difference <= TOLERANCE * scale, (beams, prompt, rank, own, tokens)
            if own != tokens:
                assert difference <= TIE * scale, (beams, prompt, rank, own, tokens)
            num_ties += own != tokens
            ended = own == tokens and own[-1] in (beams.eos_token_ids or ())
            num_ended += ended
            num_cut += own == tokens and not ended
    return num_ended, num_cut, num_ties


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_hypotheses_and_scores_equal_those_of_transformers(name: str, width: int, zoo_references) -> None:
    search = make_search(zoo_references(case(name)), width)
    totals = np.zeros(3, int)
    plain = BeamParams(width=width, max_tokens=NUM_NEW, num_return=width, eos_token_ids=())
    ours(search, make_prompts(0, search.vocab_size), plain)  # compiles
    for seed, (penalty, early) in enumerate(itertools.product(PENALTIES, EARLY_STOPPING)):
        prompts = make_prompts(seed, search.vocab_size)
        with forbid_compilation():
            found = ours(search, prompts, plain)
            if seed < 2:
                totals += compare(search, prompts, plain)
            changes = {"length_penalty": penalty, "early_stopping": early, "eos_token_ids": end_of_sequence(found)}
            totals += compare(search, prompts, dataclasses.replace(plain, **changes))
    num_ended, num_cut, num_ties = totals.tolist()
    print(f"{name}, width {width}: {num_ended} ended, {num_cut} cut off, {num_ties} differ within rounding")
    assert num_ended > 20 and num_cut > 20
    assert num_ties <= 0.01 * sum(totals)


def without_copies(pool, source, target):
    del source, target
    return pool


def all_are_first(parent: jax.Array) -> jax.Array:
    """Wrong: then all children of a parent keep the page that is not full."""
    return jnp.ones_like(parent, dtype=bool)


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        pytest.param("copy_pages", without_copies, id="the page that is not full is not copied"),
        pytest.param("_is_first_child", all_are_first, id="siblings write to one page"),
    ],
)
def test_seeded_bugs_are_noticed(function, wrong, monkeypatch, zoo_references) -> None:
    monkeypatch.setattr(pages, function, wrong)
    search = make_search(zoo_references(case(CASES[1])), 4)
    beams = BeamParams(width=4, max_tokens=NUM_NEW, num_return=4, eos_token_ids=())
    with pytest.raises(AssertionError):
        compare(search, make_prompts(0, search.vocab_size), beams)
