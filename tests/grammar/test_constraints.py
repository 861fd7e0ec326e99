"""Constrained output: always within the constraint, complete when it ends, and without effect on other requests."""

import functools
import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve import Engine, EngineConfig, Request, SamplingParams, make_submission, run
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.logit_rules import Context
from jaxserve.core.scheduler import Status, init_state, submit
from jaxserve.grammar import FREE, Constraints, combine, constrain, from_answers, from_regex
from jaxserve.grammar.vocabulary import token_bytes
from jaxserve.text.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer
from tests import small_model
from tests.text import small_tokenizers

DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
JSON = r'\{"name": "[a-zé日 ]{1,8}", "tags": \[("[a-z]{1,3}"(, "[a-z]{1,3}"){0,2})?\], "age": (0|[1-9]\d{0,2})\}'
WORDS = r"(the|cat|sat|on| |日本|é){1,6}\.?"
VOCAB, EOS, ROWS, LENGTH = 512, 1, 64, 90  # more ids than any tokenizer here has; </s>
SIZES = {"max_automata": 3, "max_states": 200, "max_entries": 20_000}
for_vocabulary = {"vocab_size": VOCAB, "eos_token_ids": [EOS]}

every_kind = pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace"])


def tokenizer_of(kind: str) -> Tokenizer:
    return small_tokenizers.tokenizer_of(kind)


@jax.jit
def draw(constraints: Constraints, start: jax.Array, seed: jax.Array) -> tuple[jax.Array, ...]:
    """Tokens that rows draw from random logits, and whether some row had none to draw."""

    def step(index, carry):
        tokens, state, stuck = carry
        position = jnp.full((ROWS,), 1 + index, jnp.int32)
        context = Context(
            tokens=tokens,
            num_tokens=position,
            prompt_length=jnp.ones((ROWS,), jnp.int32),
            stop_token_ids=jnp.full((ROWS, 1), EOS, jnp.int32),
            slot=jnp.arange(ROWS, dtype=jnp.int32),
            seen=None,
        )
        key = jax.random.fold_in(jax.random.key(seed), index)
        logits = jax.random.normal(key, (ROWS, VOCAB))
        state, logits = constrain(constraints, state, logits, context)
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        return tokens.at[:, 1 + index].set(token), state, stuck | jnp.any(jnp.max(logits, axis=1) == -jnp.inf)

    tokens = jnp.zeros((ROWS, 1 + LENGTH), jnp.int32)
    tokens, _, stuck = lax.fori_loop(0, LENGTH, step, (tokens, start, jnp.asarray(False)))
    return tokens[:, 1:], stuck


def outputs(constraints: Constraints, start: int | Sequence[int], seed: int = 0) -> list[list[int]]:
    """What the rows draw before EOS; all must get there, and then draw nothing else."""
    starts = np.broadcast_to(np.asarray(start, np.int32), (ROWS,))
    tokens, stuck = draw(constraints, starts, np.int32(seed))
    assert not stuck
    found = []
    for row in np.asarray(tokens).tolist():
        assert row[row.index(EOS) :] == [EOS] * (LENGTH - row.index(EOS))
        found.append(row[: row.index(EOS)])
    return found


def text_of(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """As the engine has it: what continues a prompt."""
    decoder = IncrementalDecoder(tokenizer, context=tokenizer.encode("the cat"))
    return "".join([*map(decoder.push, tokens), decoder.flush()])


@every_kind
def test_outputs_match_their_own_expression_side_by_side(kind):
    tokenizer = tokenizer_of(kind)
    patterns = {"words": WORDS, "blanks": r"\s?(the )*(cat|dog)"}
    patterns |= {"date": DATE} if kind != "metaspace" else {}  # it has no digits
    automata = {name: from_regex(pattern, tokenizer, **for_vocabulary) for name, pattern in patterns.items()}
    constraints, starts = combine(automata, **SIZES)
    names = [list(patterns)[i % len(patterns)] for i in range(ROWS)]
    pieces = set()
    for seed in range(3):
        for name, tokens in zip(names, outputs(constraints, [starts[name] for name in names], seed), strict=True):
            text = text_of(tokens, tokenizer)
            assert re.fullmatch(patterns[name], text), (name, text)
            assert text.encode() == b"".join(token_bytes(tokenizer)[token] for token in tokens)
            pieces |= set(tokens)
    assert max(len(token_bytes(tokenizer)[token]) for token in pieces) >= 3  # whole words are drawn too


def test_a_json_shape_is_valid_json():
    tokenizer = tokenizer_of("byte level")
    constraints, starts = combine({"json": from_regex(JSON, tokenizer, **for_vocabulary)}, **SIZES)
    texts = [text_of(tokens, tokenizer) for tokens in outputs(constraints, starts["json"])]
    for text in texts:
        record = json.loads(text)
        assert record.keys() == {"name", "tags", "age"} and 0 <= record["age"] < 1000 and len(record["tags"]) <= 3
    assert len(set(texts)) > ROWS // 2


def test_all_answers_are_reached_and_nothing_else_is():
    answers = [(5,), (5, 6), (5, 6, 7), (8, 9, 10, 11), (511, 5)]
    constraints, starts = combine({"answers": from_answers([*answers, [5, 6]], **for_vocabulary)}, **SIZES)
    found = {tuple(tokens) for seed in range(3) for tokens in outputs(constraints, starts["answers"], seed)}
    assert found == set(answers)


@every_kind
def test_texts_are_answered_as_the_tokenizer_spells_them(kind):
    tokenizer, texts = tokenizer_of(kind), ["the cat", "the mat", "on"]
    constraints, starts = combine({"a": from_answers(texts, tokenizer=tokenizer, **for_vocabulary)}, **SIZES)
    spelled = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts}
    assert {tuple(tokens) for tokens in outputs(constraints, starts["a"])} == spelled


@every_kind
def test_what_is_allowed_is_what_some_accepted_text_goes_on_with(kind):
    """The metaspace tokenizer has no digits: it may not begin what only a digit could end."""
    tokenizer = tokenizer_of(kind)
    language = {"the cat", "the", "thé", "t", "cat", "ca日"} | ({"c4", "no4"} if kind != "metaspace" else set())
    automaton = from_regex("the( cat)?|thé|t|ca[t日]|c4|no4", tokenizer, **for_vocabulary)
    waiting: list[tuple[int, bytes]] = [(0, b"")]
    while waiting:
        state, begun = waiting.pop()
        bits = np.unpackbits(automaton.allowed[state].view(np.uint8), bitorder="little")
        wanted = {EOS} if begun in {text.encode() for text in language} else set()
        for token, piece in enumerate(token_bytes(tokenizer)):
            if piece and any(text.encode().startswith(begun + piece) for text in language):
                wanted.add(token)
        assert set(np.nonzero(bits)[0].tolist()) == wanted, begun
        for token in wanted - {EOS}:
            following = automaton.successor[state, automaton.class_of[token]]
            waiting.append((int(following), begun + token_bytes(tokenizer)[token]))


def test_special_tokens_are_never_part_of_a_text():
    tokenizer = tokenizer_of("byte level")
    automaton = from_regex(r"[^\n]*", tokenizer, **for_vocabulary)
    bits = np.unpackbits(automaton.allowed.view(np.uint8), axis=1, bitorder="little")
    special = sorted(tokenizer.special_token_ids)
    assert len(special) == 3 and bits[:, [i for i in special if i != EOS]].sum() == 0
    assert not bits[:, tokenizer.vocab_size :].any() and bits[0].sum() > 250


def one_context(tokens: Sequence[int]) -> Context:
    number = len(tokens)
    return Context(
        tokens=jnp.asarray([tokens] * ROWS, jnp.int32),
        num_tokens=jnp.full((ROWS,), number, jnp.int32),
        prompt_length=jnp.full((ROWS,), number, jnp.int32),
        stop_token_ids=jnp.full((ROWS, 1), EOS, jnp.int32),
        slot=jnp.arange(ROWS, dtype=jnp.int32),
        seen=None,
    )


def test_greedy_is_the_best_allowed_token_and_free_rows_keep_their_bits():
    tokenizer = tokenizer_of("byte level")
    constraints, starts = combine({"date": from_regex(DATE, tokenizer, **for_vocabulary)}, **SIZES)
    state = np.where(np.arange(ROWS) % 2, starts["date"], FREE).astype(np.int32)
    logits = jax.random.normal(jax.random.key(0), (ROWS, VOCAB))
    digits = [token for token, piece in enumerate(token_bytes(tokenizer)) if re.fullmatch(rb"\d+", piece)]
    after, changed = constrain(constraints, jnp.asarray(state), logits, one_context([4, 4]))
    np.testing.assert_array_equal(after, state)
    np.testing.assert_array_equal(changed[::2], logits[::2])
    best = np.asarray(digits)[np.argmax(np.asarray(logits)[1::2][:, digits], axis=1)]
    np.testing.assert_array_equal(jnp.argmax(changed[1::2], axis=1), best)


def test_other_constraints_that_fit_compile_nothing_and_none_that_do_not_are_taken():
    first, starts = combine({"a": from_answers([[5, 6]], **for_vocabulary)}, **SIZES)
    assert outputs(first, starts["a"]) == [[5, 6]] * ROWS
    several = {name: from_answers([[i, 9]], **for_vocabulary) for i, name in enumerate("abc", 5)}
    with forbid_compilation():
        others, starts = combine(several, **SIZES)
        for i, name in enumerate("abc", 5):
            assert outputs(others, starts[name]) == [[i, 9]] * ROWS
    for sizes in ({"max_automata": 2}, {"max_states": 13}, {"max_entries": 17}):
        (name,) = sizes
        with pytest.raises(ValueError, match=f"need {name}=[0-9]*, but it is {sizes[name]}: raise it"):
            combine(several, **sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answers": []}, "answers is empty"),
        ({"answers": [[5], []]}, r"answer \[\] has no tokens"),
        ({"answers": [[512]]}, r"token 512, which must lie in \[0, vocab_size=512\)"),
        ({"answers": [[5, EOS]]}, "token 1, which ends sequences: leave it out"),
        ({"answers": ["yes"]}, "answer 'yes' is a text, and there is no tokenizer"),
        ({"answers": [[5]], "eos_token_ids": []}, "eos_token_ids is empty"),
        ({"answers": [[5]], "eos_token_ids": [600]}, "eos_token_ids has 600"),
        ({"answers": [[i] * 400 for i in range(2, 99)]}, "than 20000 states"),
    ],
)
def test_answers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_answers(**for_vocabulary | arguments)


def test_expressions_that_cannot_be_spelled_and_other_tokenizers_are_refused():
    with pytest.raises(ValueError, match="matches no text that this tokenizer's tokens can spell"):
        from_regex(DATE, tokenizer_of("metaspace"), **for_vocabulary)
    for kind in ("word piece", "suffix", "no decoder", "byte level, then another"):
        with pytest.raises(ValueError, match="the tokenizer's decoder is .*: use from_answers"):
            from_regex("a", tokenizer_of(kind), **for_vocabulary)
    with pytest.raises(ValueError, match="position 0: '\\^' is not supported"):
        from_regex("^a", tokenizer_of("byte level"), **for_vocabulary)


def test_automata_for_different_vocabularies_are_refused():
    small = from_answers([[5]], vocab_size=300, eos_token_ids=[0])
    with pytest.raises(ValueError, match=r"vocabularies of \[300, 512\] tokens"):
        combine({"a": small, "b": from_answers([[5]], **for_vocabulary)})
    with pytest.raises(ValueError, match=r"vocabularies of \[\] tokens"):
        combine({})
    with pytest.raises(ValueError, match="made for vocab_size=300, but the model has 512"):
        constrain(combine({"a": small})[0], jnp.zeros(ROWS, jnp.int32), jnp.zeros((ROWS, VOCAB)), one_context([1]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def small_constraints(tokenizer) -> tuple[Constraints, dict[str, np.int32]]:
    of_model = {"vocab_size": small_model.MODEL.vocab_size, "eos_token_ids": [small_model.EOS]}
    automata = {
        "date": from_regex(DATE, tokenizer, **of_model),
        "words": from_regex(WORDS, tokenizer, **of_model),
        "verdict": from_answers(["the cat", "the dog", "the"], tokenizer=tokenizer, **of_model),
    }
    return combine(automata)


def is_within(name: str, text: str) -> bool:
    patterns = {"date": DATE, "words": WORDS, "verdict": "the( cat| dog)?", "free": r"(?s:.*)"}
    return re.fullmatch(patterns[name], text) is not None


def test_requests_with_constraints_of_their_own_in_one_engine(tokenizer, small_constraints):
    """Preempted ones too, at all temperatures; those without a constraint get what they get alone."""
    constraints, starts = small_constraints
    config = EngineConfig(**small_model.CAPACITIES | {"num_pages": 13})
    engine = Engine(
        small_model.make_params(),
        small_model.MODEL,
        config,
        tokenizer=tokenizer,
        eos_token_ids=(small_model.EOS,),
        logits_fn=functools.partial(constrain, constraints),
        aux=FREE,
    )
    engine.warm_up()
    kinds, rng = {"free": None, **starts}, np.random.default_rng(0)
    requests = []
    for i in range(32):
        params = SamplingParams(temperature=(0.0, 0.5, 1.0, 2.0)[i // 4 % 4], seed=i, max_tokens=40)
        prompt = tuple(rng.integers(1, 90, 30).tolist())  # whole characters
        requests.append(Request(str(i), prompt_token_ids=prompt, params=params, aux=list(kinds.values())[i % 4]))
    results = {}
    with forbid_compilation():
        for update in engine.serve(requests):
            results |= {} if update.output is None else {update.request_id: update.output.outputs[0]}
    assert engine.stats.num_preemptions > 0
    for i, request in enumerate(requests):
        completion, name = results[request.id], list(kinds)[i % 4]
        assert is_within(name, completion.text), (name, completion.text)
        assert name == "free" or completion.finish_reason == "stop"
        if name == "free":
            (alone,) = engine.generate([request.prompt_token_ids], request.params)
            assert alone.outputs[0] == completion


def test_constraints_are_an_argument_of_a_rollout_in_a_callers_jit(tokenizer, small_constraints):
    constraints, starts = small_constraints
    config = EngineConfig(**small_model.CAPACITIES | {"kv_dtype": "float32"})
    model = small_model.MODEL

    @jax.jit
    def rollout(params, submission, constraints):
        state, _ = submit(init_state(model, config, aux=FREE), submission, model=model, config=config)
        fn = functools.partial(constrain, constraints)
        return run(params, state, model=model, config=config, max_new_tokens=40, logits_fn=fn)[1]

    params = [SamplingParams(temperature=1.5, seed=i, max_tokens=40) for i in range(6)]
    prompts = [[7, 8, 9 + i] for i in range(6)]
    submission = make_submission(prompts, params, model=model, config=config, eos_token_ids=(small_model.EOS,))
    weights = small_model.make_params()

    def texts_of(constraints: Constraints, start: np.int32) -> set[str]:
        results = rollout(weights, submission.replace(aux=np.full(6, start)), constraints)
        assert results.status[:6].tolist() == [Status.STOP] * 6
        rows = zip(results.token_ids, results.num_generated, strict=True)
        return {tokenizer.decode(tokens[: number - 1].tolist()) for tokens, number in list(rows)[:6]}

    for name, start in starts.items():
        assert all(is_within(name, text) for text in texts_of(constraints, start))
    other = from_answers([[9, 9], [11]], vocab_size=model.vocab_size, eos_token_ids=[small_model.EOS])
    sizes = {"max_automata": 3, "max_states": len(constraints.first), "max_entries": len(constraints.successor)}
    with forbid_compilation():
        others, starts = combine({"other": other}, **sizes)
        assert texts_of(others, starts["other"]) <= {tokenizer.decode([9, 9]), tokenizer.decode([11])}
