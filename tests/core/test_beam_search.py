"""Beam search: pages, isolation, compilations, refusals, texts. `tests/models/test_beam_parity.py` tests the results."""

import collections
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import BeamParams, EngineConfig, beam_search, make_beam_rules, search_beams
from jaxserve.core.beam_search import BeamState, Hypotheses, advance, pages, pages_per_request, start
from jaxserve.core.cache.page_table import PageTable, allocate_each, init_page_table
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.engine.beams import _check_memory, _shape
from jaxserve.models.params import abstract_params
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from tests import small_model, workload
from tests.core.program_text import WRITES, instructions
from tests.workload import MODEL

CONFIG = EngineConfig(
    max_slots=16, page_size=8, max_model_len=64, kv_dtype="float32", tile_rows=8, max_stop_token_ids=2
)
WIDTH, CAPACITY, NUM_NEW = 4, 20, 12
LENGTHS = np.array([1, 8, 13, 20], np.int32)
STATIC = {"model": MODEL, "config": CONFIG, "width": WIDTH}
BEAMS = BeamParams(width=WIDTH, max_tokens=NUM_NEW, num_return=WIDTH, eos_token_ids=())
rules_of = functools.partial(make_beam_rules, model=MODEL, config=CONFIG)


@pytest.fixture(scope="module")
def params() -> Any:
    return workload.make_params()


@functools.cache
def search() -> Callable[..., Hypotheses]:
    return jax.jit(functools.partial(beam_search, **STATIC))


quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


def make_prompts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.vocab_size, (len(LENGTHS), CAPACITY), np.int32)


def some_eos(params: Any) -> tuple[int, ...]:
    """Returns ids that the model generates at different times."""
    found = search()(params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS))
    return int(found.tokens[0, 0, 4]), int(found.tokens[2, 1, 7])


# --- pages


def check_pages(state: BeamState) -> None:
    """Checks that no page is lost, and that no page that a running beam writes next is shared."""
    table, num_pages = state.table, state.table.num_pages
    page_ids, free, count = map(np.asarray, (table.page_ids, table.free[: table.num_free], table.reference_count))
    references = np.bincount(page_ids.ravel(), minlength=num_pages + 1)[:num_pages]
    np.testing.assert_array_equal(references, count)
    assert sorted(free.tolist()) == np.flatnonzero(references == 0).tolist()
    held = page_ids < num_pages
    num_held = held.sum(axis=1)
    assert np.array_equal(held, np.arange(held.shape[1]) < num_held[:, None])
    for slot in range(page_ids.shape[0]):
        request = slot // WIDTH
        if state.done[request]:
            assert num_held[slot] == 0
        elif int(state.num_generated):
            computed = int(state.prompt_length[request] + state.num_generated)
            assert num_held[slot] == -(-computed // CONFIG.page_size)
            assert count[page_ids[slot, num_held[slot] - 1]] == 1


def trace(params: Any, rules: Any) -> Iterator[tuple[BeamState, BeamState]]:
    """Every state and the one after it."""
    state = quick_jit(functools.partial(start, **STATIC))(params, make_prompts(), LENGTHS, rules)
    step = quick_jit(functools.partial(advance, model=MODEL, config=CONFIG))
    while not bool(jnp.all(state.done)):
        before, state = state, step(params, state, rules)
        yield jax.device_get(before), jax.device_get(state)


def check_trace(params: Any, rules: Any) -> BeamState:
    """Checks all states; returns the last one."""
    most_used = most_shared = 0
    for before, after in trace(params, rules):
        check_pages(before)
        check_pages(after)
        shared = np.flatnonzero(after.table.reference_count > 1)
        for old, new in zip(jax.tree.leaves(before.pool), jax.tree.leaves(after.pool), strict=True):
            np.testing.assert_array_equal(new[shared], old[shared])
        most_used = max(most_used, after.table.num_pages - int(after.table.num_free))
        most_shared = max(most_shared, int(after.table.reference_count.max()))
        last = after
    assert most_shared == WIDTH
    assert most_used <= last.table.num_pages
    return last


def test_pages_are_conserved_shared_ones_are_never_written_and_all_are_free_in_the_end(params):
    rules = rules_of(BeamParams(width=WIDTH, max_tokens=NUM_NEW), LENGTHS, some_eos(params))
    last = check_trace(params, rules)
    assert int(last.table.num_free) == last.table.num_pages
    found = search()(params, make_prompts(), LENGTHS, rules)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), last.hypotheses, jax.device_get(found))
    assert len(set(np.asarray(found.length).ravel().tolist())) > 2


def test_a_page_that_siblings_share_and_write_is_noticed(params, monkeypatch):
    monkeypatch.setattr(pages, "_is_first_child", lambda parent: jnp.ones_like(parent, dtype=bool))
    with pytest.raises(AssertionError):
        check_trace(params, rules_of(BEAMS, LENGTHS))


@pytest.mark.parametrize(
    ("prompt", "max_new", "width", "pages"),
    [
        (8, 1, 4, 1),  # the only new token is never computed
        (8, 2, 4, 5),  # the prompt's page, and one per beam
        (7, 2, 4, 4),  # a page per beam, that of the prompt among them
        (16, 9, 2, 4),  # 24 positions: two pages of the prompt, one per beam
        (16, 10, 2, 6),  # 25 positions
        (63, 50, 3, 10),  # 64 positions at most: 7 full pages of the prompt, one more per beam
    ],
)
def test_pages_of_a_request_are_bounded_by_full_prompt_pages_and_those_of_each_beam(prompt, max_new, width, pages):
    def held(length: int) -> int:
        computed = length + min(max_new, 64 - length) - 1
        return length // 8 + width * (-(-computed // 8) - length // 8)

    bound = pages_per_request(prompt, max_new, width=width, max_len=64, page_size=8)
    assert held(prompt) == pages
    assert bound == max(held(length) for length in range(1, prompt + 1))


class Pages:
    """A page table as lists: the pages of each slot."""

    def __init__(self, slots: list[list[int]]) -> None:
        self.slots = slots

    def check(self, table: PageTable) -> None:
        used = [page for pages in self.slots for page in pages]
        held = [[page for page in row if page < table.num_pages] for row in table.page_ids.tolist()]
        assert held == self.slots
        assert sorted(table.free[: table.num_free].tolist()) == sorted(set(range(table.num_pages)) - set(used))
        assert table.reference_count.tolist() == [used.count(page) for page in range(table.num_pages)]


@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_of_take_overs_agrees_with_lists(seed):
    rng, num_slots, num_pages = random.Random(seed), 4, 12
    move, give = jax.jit(pages.take_over), jax.jit(allocate_each)
    table, expected = init_page_table(num_slots, 3, num_pages), Pages([[] for _ in range(num_slots)])
    for _ in range(60):
        wants = [len(held) < 3 and rng.random() < 0.6 for held in expected.slots]
        table, granted = give(table, jnp.array(wants), jnp.array(list(map(len, expected.slots)), jnp.int32))
        for slot, got in enumerate(granted.tolist()):
            if got:
                expected.slots[slot] = [*expected.slots[slot], int(table.page_ids[slot, len(expected.slots[slot])])]
        expected.check(table)
        parent = [rng.randrange(num_slots + 1) for _ in range(num_slots)]
        kept = [rng.randint(0, 3) for _ in range(num_slots)]
        table = move(table, jnp.array(parent, jnp.int32), jnp.array(kept, jnp.int32))
        expected.slots = [[*expected.slots, []][p][:k] for p, k in zip(parent, kept, strict=True)]
        expected.check(table)


# --- isolation, shapes, invalid rows


def test_a_request_alone_gives_the_same_bits_as_among_others(params):
    rules = rules_of(BeamParams(width=WIDTH, max_tokens=NUM_NEW), LENGTHS, some_eos(params))
    together = jax.device_get(search()(params, make_prompts(), LENGTHS, rules))
    for row in range(len(LENGTHS)):
        lengths = np.where(np.arange(len(LENGTHS)) == row, LENGTHS, 0).astype(np.int32)
        alone = jax.device_get(search()(params, make_prompts(), lengths, rules))
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]), alone, together)
        assert not np.any(np.delete(alone.valid, row, axis=0))


def test_other_prompts_penalties_and_stop_rules_compile_nothing(params):
    search()(params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS))
    with forbid_compilation():
        for seed, early in enumerate((False, True, "never")):
            beams = BeamParams(width=WIDTH, max_tokens=NUM_NEW - seed, length_penalty=0.5 * seed, early_stopping=early)
            rules = rules_of(beams, LENGTHS - 1, (seed,), max_new=NUM_NEW)
            found = jax.device_get(search()(params, make_prompts(seed), LENGTHS - 1, rules))
            assert np.array_equal(found.valid.all(axis=1), LENGTHS > 1)
            assert found.length.max() <= NUM_NEW - seed


@pytest.mark.parametrize("what", ["length", "token below 0", "token above V", "max_tokens", "no max_tokens"])
def test_a_row_out_of_range_gets_nothing_and_harms_no_other(what, params):
    prompts, lengths, rules = make_prompts(), LENGTHS.copy(), rules_of(BEAMS, LENGTHS)
    expected = jax.device_get(search()(params, prompts, lengths, rules))
    if what == "length":
        lengths[2] = CAPACITY + 1
    if what == "token below 0":
        prompts[2, 3] = -1
    if what == "token above V":
        prompts[2, 12] = MODEL.vocab_size
    if "max_tokens" in what:
        wrong = 0 if what == "no max_tokens" else NUM_NEW + 1
        rules = rules.replace(max_tokens=np.where(np.arange(4) == 2, wrong, rules.max_tokens).astype(np.int32))
    found = jax.device_get(search()(params, prompts, lengths, rules))
    assert not found.valid[2].any()
    others = [0, 1, 3]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), found, expected)


def test_tokens_beyond_the_prompt_mean_nothing(params):
    prompts = make_prompts()
    expected = jax.device_get(search()(params, prompts, LENGTHS, rules_of(BEAMS, LENGTHS)))
    beyond = np.arange(CAPACITY)[None] >= LENGTHS[:, None]
    found = search()(params, np.where(beyond, -7, prompts), LENGTHS, rules_of(BEAMS, LENGTHS))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": dataclasses.replace(CONFIG, max_slots=15)}, r"16 beams, above max_slots=15"),
        ({"config": dataclasses.replace(CONFIG, num_pages=51)}, r"may need 52 pages of 8 tokens, above num_pages=51"),
        ({"config": dataclasses.replace(CONFIG, max_model_len=20)}, "leave nothing of the 20 .*: use at most 19"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"num_return": 5}, "num_return=5 must lie between 1 and width=4"),
        ({"num_return": 0}, "num_return=0 must lie between 1 and width=4"),
        ({"model": dataclasses.replace(MODEL, vocab_size=5)}, "the vocabulary has 5 tokens: use a smaller width"),
    ],
)
def test_what_does_not_fit_is_refused_while_tracing(changes, message, params):
    program = functools.partial(beam_search, **STATIC | changes)
    params = abstract_params(changes["model"], jnp.float32) if "model" in changes else params
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(program, params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS))


def test_the_smallest_pool_that_is_not_refused_serves_all_lengths(params):
    """The other tests have this pool too: without `num_pages` it has no page more than needed."""
    config = dataclasses.replace(CONFIG, num_pages=52)
    program = functools.partial(start, **STATIC | {"config": config})
    state = jax.eval_shape(program, params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS))
    assert state.table.num_pages == 52


# --- the compiled program


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "backend"), [("bfloat16", "reference"), ("float32", "native")])
def test_no_loop_copies_a_pool_array(kv_dtype, backend):
    """Outside of loops the arrays of the pool are made, once: XLA fills one with zeros and copies it for the others."""
    model = dataclasses.replace(MODEL, max_position=2048)
    config = dataclasses.replace(CONFIG, max_model_len=2048, kv_dtype=kv_dtype, attention_backend=backend)
    lengths = np.array([500, 3, 70], np.int32)
    rules = make_beam_rules(dataclasses.replace(BEAMS, max_tokens=301), lengths, model=model, config=config)
    num_pages = 3 * pages_per_request(500, 301, width=WIDTH, max_len=2048, page_size=8)
    shape = (num_pages, model.num_kv_heads, 8, model.head_dim)
    program = jax.jit(functools.partial(beam_search, model=model, config=config, width=WIDTH))
    shapes = jax.eval_shape(lambda: workload.make_params(jnp.dtype(kv_dtype)))
    prompts = jax.ShapeDtypeStruct((3, 500), jnp.int32)
    compiled = program.lower(shapes, prompts, lengths, rules).compile()
    elsewhere, entry = re.split(r"^ENTRY ", compiled.as_text(), flags=re.MULTILINE)
    dims = f"[{','.join(map(str, shape))}]"

    def found(text: str) -> collections.Counter:
        return collections.Counter(opcode for kind, opcode in instructions(text) if dims in kind)

    passing = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "fusion"}
    writers = {"reference": "scatter", "native": "custom-call"}[backend]
    passing.add(writers)
    # Of keys and of values, in two loops; native code does all layers at once.
    assert found(elsewhere)[writers] >= (2 if backend == "native" else 4 * model.num_layers)
    assert not set(found(elsewhere)) - passing - WRITES - {"broadcast"}, found(elsewhere)
    assert found(entry)["copy"] < 2 * model.num_layers
    array_bytes = int(np.prod(shape)) * jnp.dtype(kv_dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < (2 * model.num_layers + 1) * array_bytes


@pytest.mark.slow
def test_the_kernels_interpreted_find_what_the_plain_backend_finds(params):
    expected = jax.device_get(search()(params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS)))
    config = dataclasses.replace(CONFIG, attention_backend="triton", interpret_kernels=True)
    program = quick_jit(functools.partial(beam_search, **STATIC | {"config": config}))
    found = jax.device_get(program(params, make_prompts(), LENGTHS, rules_of(BEAMS, LENGTHS)))
    np.testing.assert_allclose(found.score, expected.score, atol=1e-4)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


# --- for users


SMALL = EngineConfig(**small_model.CAPACITIES | {"num_pages": 40, "max_slots": 6, "kv_dtype": "float32"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def small_search(prompts: Any, beams: BeamParams | None = None, **changes: Any) -> list:
    given = {"params": small_model.make_params(), "model": small_model.MODEL, "config": SMALL} | changes
    return search_beams(prompts, beams, **given)


TEXTS = ["the cat sat on", "and", "the dog did not sit on the mat, and", "mat", "a"]
TWO = BeamParams(width=2, max_tokens=8, num_return=2, length_penalty=0.5)


def test_texts_come_back_with_scores_in_the_order_of_the_prompts(tokenizer):
    results = small_search(TEXTS, TWO, tokenizer=tokenizer, eos_token_ids=(small_model.EOS,))
    assert [result.prompt for result in results] == TEXTS
    for result in results:
        assert result.error is None and result.prompt_token_ids == tuple(tokenizer.encode(result.prompt))
        best, second = result.sequences
        assert (best.index, second.index) == (0, 1) and best.score >= second.score
        for sequence in result.sequences:
            assert (sequence.finish_reason, len(sequence.token_ids)) == ("length", TWO.max_tokens)
            assert sequence.score == pytest.approx(sequence.cumulative_logprob / TWO.max_tokens**0.5)
            assert tokenizer.decode(sequence.token_ids) == sequence.text
    with forbid_compilation():  # in other groups, with other parameters
        again = small_search(
            [list(result.prompt_token_ids) for result in results[::-1]],
            dataclasses.replace(TWO, max_tokens=7, early_stopping=True, num_return=1),
        )
        same = small_search(TEXTS, TWO, tokenizer=tokenizer, eos_token_ids=(small_model.EOS,))
    assert same == results
    assert all(len(result.sequences) == 1 and result.sequences[0].text == "" for result in again)


def test_the_token_that_ends_a_hypothesis_is_in_the_tokens_and_not_in_the_text(tokenizer):
    (free, *_) = small_search(TEXTS, TWO, tokenizer=tokenizer)
    eos = free.sequences[0].token_ids[3]
    for given in ({"eos_token_ids": (eos,)}, {}):
        beams = TWO if given else dataclasses.replace(TWO, eos_token_ids=(eos,))
        results = small_search(TEXTS, beams, tokenizer=tokenizer, **given)
        ended = [sequence for sequence in results[0].sequences if sequence.finish_reason == "stop"]
        assert ended
        for sequence in ended:
            assert sequence.token_ids.index(eos) == len(sequence.token_ids) - 1
            assert sequence.text == tokenizer.decode(sequence.token_ids[:-1])


def test_weights_that_are_not_finite_give_an_error_and_no_sequences(tokenizer):
    damaged = jax.tree.map(lambda leaf: leaf * jnp.nan, small_model.make_params())
    for result in small_search(TEXTS, TWO, tokenizer=tokenizer, params=damaged):
        assert result.sequences == () and "not finite" in (result.error or "")


def test_the_longest_sequence_bounds_the_output():
    rules = make_beam_rules(BeamParams(max_tokens=50), np.array([90, 10, 0]), model=small_model.MODEL, config=SMALL)
    assert rules.max_tokens.tolist() == [SMALL.max_model_len - 90, 50, 0]
    never = BeamParams(max_tokens=50, early_stopping="never", length_penalty=2.0)
    rules = make_beam_rules(never, np.array([90, 10, 0]), model=small_model.MODEL, config=SMALL)
    assert np.all(rules.attainable_divisor == np.array([[6.0], [50.0], [1.0]], np.float32) ** 2)


def test_sizes_are_powers_of_two_unless_they_fit_only_as_they_are():
    shape_of = functools.partial(_shape, [[7] * 33] * 3, BeamParams(width=2, max_tokens=17), model=small_model.MODEL)
    assert shape_of(config=dataclasses.replace(SMALL, num_pages=200)) == (3, 64, 32)
    assert shape_of(config=dataclasses.replace(SMALL, num_pages=None, max_slots=16, max_queue=None)) == (4, 64, 32)
    exact = pages_per_request(33, 17, width=2, max_len=96, page_size=8)
    assert exact < pages_per_request(64, 32, width=2, max_len=96, page_size=8)
    assert shape_of(config=dataclasses.replace(SMALL, num_pages=12)) == (1, 33, 17)


def test_no_prompts_give_no_results():
    assert small_search([]) == []


@pytest.mark.parametrize(
    ("prompts", "beams", "message"),
    [
        (["text"], {}, "prompt 0: the text 'text' needs a tokenizer"),
        ([[1], []], {}, "prompt 1: the prompt has no tokens"),
        ([[1], [300]], {}, "prompt 1: .* has 300, but the model's token ids go from 0 to 299"),
        ([[1] * 96], {}, "prompt 0: the prompt has 96 tokens"),
        ([[1]], {"width": 7}, "7 beams, above max_slots=6"),
        ([[1]], {"width": 6, "max_tokens": 80}, "may need 60 pages of 8 tokens, above num_pages=40"),
        ([[1]], {"eos_token_ids": (300,)}, "eos_token_ids has 300, but the model's token ids go from 0 to 299"),
        ([[1]], {"eos_token_ids": tuple(range(9))}, "9 .*above max_stop_token_ids=8|prompt 0: .*9 stop tokens"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(prompts, beams, message):
    with pytest.raises(ValueError, match=message):
        small_search(prompts, BeamParams(**beams))


def test_a_pool_larger_than_free_memory_is_refused():
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 400}

    class Weight:
        dtype = jnp.dtype("float32")

        def devices(self) -> set[Device]:
            return {Device()}

    arguments = {"params": {"embedding": Weight()}, "model": small_model.MODEL, "config": SMALL}
    with pytest.raises(ValueError, match="but 0.0 MB of the device's memory are free"):
        _check_memory(1, 8, 8, 2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width=0 must be an integer from 1"),
        ({"width": True}, "width=True"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"length_penalty": float("nan")}, "length_penalty=nan must be a finite number"),
        ({"length_penalty": "1"}, "length_penalty='1' must be a finite number"),
        ({"length_penalty": 40.0}, "length_penalty=40.0 is out of float32's range for 16 tokens"),
        ({"length_penalty": -40.0}, "length_penalty=-40.0 is out of float32's range"),
        ({"early_stopping": "always"}, "early_stopping='always' must be true, false or 'never'"),
        ({"early_stopping": 1}, "early_stopping=1"),
        ({"num_return": 5}, "num_return=5 must be an integer from 1 to 4"),
        ({"eos_token_ids": (-1,)}, r"eos_token_ids\[0\]=-1"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens='no'"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BeamParams(**fields)
