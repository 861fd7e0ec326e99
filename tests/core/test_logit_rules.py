"""The rules on logits against transformers' processors and a float64 oracle; each alone, in its order, and skipped."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.core import logit_rules
from jaxserve.core.logit_rules import BITS, Context, LogitRules, apply, ending, in_force, plain_rules
from tests.core import sampling_cases
from tests.core.sampling_cases import CONFIG, EOS, RULES, Case, arrays_of, random_case, random_rules, ruled

VOCAB = 70  # three words of allowed ids, the last not full
NUM = 256  # rows of the one compiled program
APPLY = jax.jit(apply)
ALL = np.ones(NUM, bool)


def random_logits(seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((NUM, VOCAB))).astype(np.float32)


def padded(cases: list[Case]) -> tuple[LogitRules, Context]:
    """Returns rules and context of these cases, filled up with rows without rules."""
    rest = [Case(SamplingParams(), (0,), ())] * (NUM - len(cases))
    return arrays_of([*cases, *rest], VOCAB)[1:]


def changed(logits: np.ndarray, cases: list[Case], program: Callable[..., Any] = APPLY) -> np.ndarray:
    return np.asarray(program(logits, *padded(cases), ALL))


def assert_follows_the_oracle(cases: list[Case], logits: np.ndarray, program: Callable[..., Any] = APPLY) -> None:
    actual = changed(logits, cases, program)[: len(cases)]
    expected = np.stack([ruled(row, case) for row, case in zip(logits, cases, strict=False)])
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    # Additions may cancel: the error is that of the largest number on the way.
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_alone_is_the_oracles(rule):
    rng = np.random.default_rng(1)
    cases = [random_case(rng, VOCAB, rule, exact=False) for _ in range(NUM)]
    logits = random_logits(1)
    assert_follows_the_oracle(cases, logits)
    assert np.any(changed(logits, cases) != logits, axis=1).mean() > 0.4


@pytest.mark.parametrize("seed", range(4))
def test_rules_in_any_combination_are_the_oracles(seed):
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, VOCAB, *random_rules(rng), exact=False) for _ in range(NUM)]
    assert_follows_the_oracle(cases, random_logits(seed))


def no_presence(logits, rules, seen):
    return PENALISE(logits, rules.replace(presence_penalty=jnp.zeros_like(rules.presence_penalty)), seen)


def of_prompts_too(logits, rules, seen):
    return PENALISE(logits, rules, seen + 2 * (seen & 1))


def repetition_last(logits, rules, seen):
    one, none = jnp.ones_like(rules.repetition_penalty), jnp.zeros_like(rules.repetition_penalty)
    first = PENALISE(logits, rules.replace(repetition_penalty=one), seen)
    return PENALISE(first, rules.replace(presence_penalty=none, frequency_penalty=none), seen)


def one_token_late(tokens, num_tokens, length):
    return ENDING(tokens, num_tokens - 1, length)


PENALISE, ENDING = logit_rules._penalise, ending


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_penalise", no_presence),
        ("_penalise", of_prompts_too),
        ("_penalise", repetition_last),
        ("ending", one_token_late),
    ],
)
def test_the_tests_above_notice_a_wrong_rule(monkeypatch, name, mutant):
    monkeypatch.setattr(logit_rules, name, mutant)
    rng = np.random.default_rng(0)
    cases = [random_case(rng, VOCAB, *RULES, exact=False) for _ in range(NUM)]
    with pytest.raises(AssertionError):
        assert_follows_the_oracle(cases, random_logits(0), jax.jit(lambda *args: apply(*args)))


def one_row(params: SamplingParams, prompt: tuple[int, ...] = (1,), generated: tuple[int, ...] = (), **logits: float):
    """Logits of one row afterwards; `logits`: t5=1.0 is that of token 5, the others' are 0."""
    given = np.zeros((NUM, VOCAB), np.float32)
    for name, value in logits.items():
        given[0, int(name[1:])] = value
    return changed(given, [Case(params, prompt, generated)])[0]


def test_bias_comes_before_repetition_and_repetition_before_frequency_and_presence():
    params = SamplingParams(logit_bias={5: 1}, repetition_penalty=2, frequency_penalty=0.5, presence_penalty=0.25)
    assert one_row(params, (1,), (5, 2, 5), t5=1.0)[5] == (1 + 1) / 2 - 2 * 0.5 - 0.25
    assert one_row(params, (1,), (5, 2, 5), t5=-3.0)[5] == (-3 + 1) * 2 - 2 * 0.5 - 0.25


def test_what_is_ruled_out_stays_so_whatever_its_bias_and_penalties():
    params = SamplingParams(
        allowed_token_ids=[4, 5, 6],
        bad_words=[[5]],
        min_tokens=1,
        stop_token_ids=[6],
        logit_bias={5: 100, 6: 100, 7: 100},
        repetition_penalty=0.1,
        frequency_penalty=-2,
        presence_penalty=-2,
    )
    assert np.flatnonzero(one_row(params, (5, 6, 7)) > -np.inf).tolist() == [4]


def test_only_generated_tokens_have_frequency_and_presence_but_prompt_tokens_have_repetition():
    generated_only = SamplingParams(frequency_penalty=1, presence_penalty=0.5)
    row = one_row(generated_only, (5, 5, 6), (6, 7, 7, 7))
    assert row[5:9].tolist() == [0, -1.5, -3.5, 0]
    assert one_row(SamplingParams(repetition_penalty=2), (5,), (6,), t5=4, t6=-4, t7=4)[5:8].tolist() == [2, -8, 4]


def test_allowed_ids_are_the_right_bits():
    ids = [0, BITS - 1, BITS, VOCAB - 1]
    assert np.flatnonzero(one_row(SamplingParams(allowed_token_ids=ids)) > -np.inf).tolist() == ids
    everything = one_row(SamplingParams(allowed_token_ids=range(VOCAB)), t3=2.0)
    assert np.all(everything > -np.inf) and everything[3] == 2


@pytest.mark.parametrize(
    ("word", "prompt", "generated", "banned"),
    [
        ((9,), (1,), (), True),
        ((5, 9), (1,), (5,), True),
        ((5, 9), (5,), (), True),  # the prompt counts
        ((4, 5, 9), (3, 4), (5,), True),  # across its end
        ((4, 5, 9), (5, 4), (), False),
        ((4, 5, 9), (4,), (5, 1), False),
        ((4, 4, 5, 9), (4, 5), (), False),  # longer than what is there
        ((1, 4, 5, 9), (1, 4, 5), (), True),
        ((9, 9), (9,), (), True),
    ],
)
def test_the_last_token_of_a_bad_word_is_ruled_out_where_those_before_it_stand(word, prompt, generated, banned):
    ruled_out = np.isneginf(one_row(SamplingParams(bad_words=[word]), prompt, generated))
    assert np.flatnonzero(ruled_out).tolist() == ([9] if banned else [])


def test_tokens_beyond_the_sequence_do_not_count_for_bad_words():
    rules, context = padded([Case(SamplingParams(bad_words=[[5, 9]]), (1, 2), ())])
    for stale in range(3, CONFIG.max_model_len):
        context.tokens[0, stale - 1] = 5
    assert np.all(np.asarray(APPLY(np.zeros((NUM, VOCAB), np.float32), rules, context, ALL)) == 0)


@pytest.mark.parametrize("num_generated", [0, 1, 2, 3, 4])
def test_stop_tokens_are_ruled_out_until_the_minimum_is_generated_and_not_after(num_generated):
    params = SamplingParams(min_tokens=3, stop_token_ids=[6, 60])
    row = one_row(params, (1, 2), (8,) * num_generated)
    assert np.flatnonzero(np.isneginf(row)).tolist() == ([EOS, 6, 60] if num_generated < 3 else [])
    ignoring = dataclasses.replace(params, ignore_eos=True)
    row = one_row(ignoring, (1, 2), (8,) * num_generated)
    assert np.flatnonzero(np.isneginf(row)).tolist() == ([6, 60] if num_generated < 3 else [])


def test_bad_words_of_one_token_need_no_room_for_longer_ones():
    config = dataclasses.replace(CONFIG, max_bad_words=2, max_bad_word_len=1)
    rules = jax.device_get(plain_rules(2, VOCAB, config))
    bad_words = np.array([[[-1], [-1]], [[9], [4]]], np.int32)
    context = jax.tree.map(lambda leaf: jnp.asarray(leaf[:2]), padded([])[1])
    banned = np.isneginf(apply(jnp.zeros((2, VOCAB)), rules.replace(bad_words=bad_words), context, jnp.ones(2, bool)))
    assert banned.sum(axis=1).tolist() == [0, 2] and banned[1, [4, 9]].all()


def test_with_no_room_for_any_rule_logits_stay_as_they_are():
    config = dataclasses.replace(CONFIG, max_bad_words=0, max_logit_bias=0, penalties=False)
    rules = plain_rules(2, VOCAB, config)
    context = jax.tree.map(lambda leaf: leaf[:2], padded([])[1]).replace(seen=None)
    logits = random_logits(0)[:2]
    np.testing.assert_array_equal(apply(jnp.asarray(logits), rules, context, jnp.ones(2, bool)), logits)
    assert not in_force(rules, context).any()


# Independence, and what is skipped.


def random_batch(seed: int) -> tuple[np.ndarray, LogitRules, Context]:
    rng = np.random.default_rng(seed)
    return random_logits(seed), *padded([random_case(rng, VOCAB, *random_rules(rng), exact=False) for _ in range(NUM)])


def test_a_row_gets_the_same_bits_whatever_rules_the_others_have():
    logits, rules, context = random_batch(5)
    none = jax.device_get(plain_rules(NUM, VOCAB, CONFIG))
    expected = np.asarray(APPLY(logits, rules, context, ALL))
    for kept in (np.arange(NUM) % 2 == 0, np.arange(NUM) % 7 == 3):
        for own, others, result in ((rules, none, expected), (none, rules, logits)):
            mixed = jax.tree.map(
                lambda a, b, kept=kept: np.where(kept[(...,) + (None,) * (a.ndim - 1)], a, b), own, others
            )
            assert_same_bits(np.asarray(APPLY(logits, mixed, context, ALL))[kept], result[kept])
    order = np.random.default_rng(0).permutation(NUM)
    moved = jax.tree.map(lambda leaf: leaf[order], (rules, context.replace(seen=None)))
    moved = np.asarray(APPLY(logits[order], moved[0], moved[1].replace(seen=context.seen), ALL))
    assert_same_bits(moved, expected[order])


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_rules_of_inactive_rows_are_skipped():
    """Seen from the result: their own logits are left as they were, which would not be so had anything been computed."""
    logits, rules, context = random_batch(6)
    np.testing.assert_array_equal(APPLY(logits, rules, context, np.zeros(NUM, bool)), logits)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_only_an_inactive_row_has_is_skipped_beside_the_other_rules(rule):
    rng = np.random.default_rng(7)
    others = [name for name in RULES if name != rule and {name, rule} - {"repetition", "frequency", "presence"}]
    cases = [random_case(rng, VOCAB, rule, exact=False) for _ in range(20)]
    cases += [random_case(rng, VOCAB, *others, exact=False) for _ in range(20)]
    logits, active = random_logits(7), ALL.copy()
    active[:20] = False
    result = np.asarray(APPLY(logits, *padded(cases), active))
    np.testing.assert_array_equal(result[:20], logits[:20])
    assert np.any(result[20:40] != logits[20:40], axis=1).all()


def test_rows_whose_logits_may_change_are_said_to_have_rules_in_force():
    logits, rules, context = random_batch(8)
    forced = np.asarray(in_force(rules, context))
    different = np.any(np.asarray(APPLY(logits, rules, context, ALL)) != logits, axis=1)
    assert not np.any(different & ~forced)
    assert 10 < forced.sum() < NUM - 10
    passed = Case(SamplingParams(min_tokens=2, stop_token_ids=[4]), (1,), (5, 6))
    early = dataclasses.replace(passed, generated=(5,))
    assert np.asarray(in_force(*padded([passed, early])))[:3].tolist() == [False, True, False]


# Against transformers, which has processors for all of this but frequency and presence.


def processed(case: Case, logits: np.ndarray, *make: Callable[..., Any]) -> np.ndarray:
    """Logits of one row after transformers' processors, in this order."""
    torch = pytest.importorskip("torch")
    from transformers import generation

    scores, ids = torch.tensor(logits[None]), torch.tensor([[*case.prompt, *case.generated]])
    for processor in make:
        scores = processor(generation, case)(ids, scores)
    return scores[0].numpy()


def allowed(generation: Any, case: Case) -> Any:
    return generation.PrefixConstrainedLogitsProcessor(lambda batch, ids: list(case.params.allowed_token_ids or ()), 1)


def bad_words(generation: Any, case: Case) -> Any:
    return generation.NoBadWordsLogitsProcessor([list(word) for word in case.params.bad_words])


def min_tokens(generation: Any, case: Case) -> Any:
    stops = [EOS, *case.params.stop_token_ids]
    return generation.MinNewTokensLengthLogitsProcessor(len(case.prompt), case.params.min_tokens, stops)


def bias(generation: Any, case: Case) -> Any:
    pairs: dict[int, float] = dict(case.params.logit_bias)
    return generation.SequenceBiasLogitsProcessor({(token,): value for token, value in pairs.items()})


def repetition(generation: Any, case: Case) -> Any:
    return generation.RepetitionPenaltyLogitsProcessor(case.params.repetition_penalty)


PROCESSORS = {
    "allowed_token_ids": allowed,
    "bad_words": bad_words,
    "min_tokens": min_tokens,
    "logit_bias": bias,
    "repetition": repetition,
}


@pytest.mark.parametrize("rules", [(name,) for name in PROCESSORS] + [tuple(PROCESSORS)], ids="-".join)
def test_logits_are_those_of_the_processors_of_transformers(rules):
    """To the bit, but for repetition: XLA makes a division by one number per row a multiplication by its inverse."""
    pytest.importorskip("torch")
    rng, logits = np.random.default_rng(9), random_logits(9)
    cases = [random_case(rng, VOCAB, *rules, exact=False) for _ in range(80)]
    actual = changed(logits, cases)
    for row, case in enumerate(cases):
        expected = processed(case, logits[row], *(PROCESSORS[rule] for rule in rules))
        np.testing.assert_array_max_ulp(actual[row], expected, maxulp=int("repetition" in rules))
    assert np.any(actual[:80] != logits[:80], axis=1).mean() > 0.4


def test_cases_are_told_apart_by_their_stale_tokens_and_slots():
    """The helpers of these tests put random tokens behind each sequence, and no row into the slot of its own number."""
    _, _, context = arrays_of([Case(SamplingParams(), (1,), ())] * NUM, VOCAB)
    assert len(np.unique(context.tokens[:, 1:])) == VOCAB
    assert np.mean(context.slot == np.arange(NUM)) < 0.1
    assert sampling_cases.EOS in context.stop_token_ids[0]
