"""Regular expressions as automata over bytes, against `re.fullmatch`."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.grammar.budget import MAX_WORK, Budget
from jaxserve.grammar.dfa import determinise, equivalent_states
from jaxserve.grammar.nfa import Nfa
from jaxserve.grammar.regex import ByteAutomaton, compile_regex
from jaxserve.grammar.syntax import parse

LITERALS = ["a", "b", "é", "日", "\\.", "\\n", "\\x61", "{", "a{x", " "]
CLASSES = [
    "[ab]",
    "[^a]",
    "[^\\d]",
    "[a-é]",
    "[]a]",
    "[a\\]-]",
    "[\\w.]",
    "[\\u0061-\\U0001F600]",
    ".",
    "\\d",
    "\\S",
    "\\W",
]
QUANTIFIERS = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "{0}", "{,}"]
TEXTS = st.text(st.sampled_from("aab.é日x{] \n1_😀"), max_size=7)


def _groups(inner):
    pairs = st.tuples(inner, inner)
    repeated = st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda parts: f"(?:{parts[0]}){parts[1]}")
    return pairs.map("".join) | pairs.map(lambda both: f"({both[0]}|{both[1]})") | repeated


PATTERNS = st.recursive(st.sampled_from(["", *LITERALS, *CLASSES]), _groups, max_leaves=9)


def accepts(automaton: ByteAutomaton, text: str) -> bool:
    state = 0
    for byte in text.encode():
        state = int(automaton.successor[state, byte])
        if state < 0:
            return False
    return bool(automaton.accepting[state])


@given(pattern=PATTERNS, data=st.data())
def test_it_accepts_what_the_whole_pattern_matches(pattern, data):
    expected, automaton = re.compile(pattern, re.ASCII), compile_regex(pattern)
    for text in [
        *data.draw(st.lists(TEXTS, min_size=8, max_size=8)),
        _walk(automaton, data.draw(st.integers(0, 2**32))),
    ]:
        assert accepts(automaton, text) == (expected.fullmatch(text) is not None), text


def _walk(automaton: ByteAutomaton, seed: int) -> str:
    """A text along random edges, to be cut where it accepts; thereby it mostly matches."""
    rng, state, found, end = np.random.default_rng(seed), 0, bytearray(), 0
    for _ in range(40):
        end = len(found) if automaton.accepting[state] else end
        (choices,) = np.nonzero(automaton.successor[state] >= 0)
        if not len(choices):
            break
        found.append(int(rng.choice(choices)))
        state = int(automaton.successor[state, found[-1]])
    return bytes(found[:end]).decode()


@pytest.mark.parametrize(
    "pattern", [".", "[^\\x00-\\x7f]", "[\\u07f0-\\U00010400]", "[߿ࠀ퟿\ue000\uffff\U00010000\U0010ffff]"]
)
def test_every_character_is_its_utf8(pattern):
    expected, automaton = re.compile(pattern), compile_regex(pattern)
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10400, 0x10FFFF]
    for code in {*edges, *(edge + 1 for edge in edges[:-1]), *range(0, 0x110000, 997)} - {*range(0xD800, 0xE000)}:
        assert accepts(automaton, chr(code)) == (expected.fullmatch(chr(code)) is not None), hex(code)
    surrogate, too_long = (0xED, 0xA0, 0x80), (0xC0, 0x80)
    for sequence in (surrogate, too_long):
        state = 0
        for byte in sequence:
            state = int(automaton.successor[state, byte]) if state >= 0 else state
        assert state < 0


def test_the_automaton_is_the_smallest_one():
    for pattern, number in [("(a|b)*a(a|b){8}", 512), ("aa*|a+|(a|aa)+", 2), ("abd|acd|(b|c)d", 4), ("a*", 1), ("", 1)]:
        assert len(compile_regex(pattern).accepting) == number, pattern


def test_every_state_leads_to_a_match():
    automaton = compile_regex("a(b|[^\\x00-\\U0010ffff])c|d[^\\x00-\\U0010ffff]")
    assert len(automaton.accepting) == 4 and automaton.successor[0, ord("d")] == -1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^a", r"'\^' is not supported: leave it out"),
        ("a$", r"'\$' is not supported"),
        ("(a", r"a group has no '\)'"),
        ("a)", r"position 1: '\)' closes no group"),
        ("[a", r"ends within \[\.\.\.\]"),
        ("a\\", "ends within an escape"),
        ("*a", "nothing to repeat"),
        ("a**", "a quantifier follows a quantifier"),
        ("a*?", "'\\?' after a quantifier is not supported"),
        ("a{2}+", "'\\+' after a quantifier is not supported"),
        ("a{3,2}", "allows no number of repetitions"),
        ("[b-a]", r"a range in \[\.\.\.\] must go"),
        ("[\\d-a]", r"a range in \[\.\.\.\] must go"),
        ("(?=a)", "no flags, no looking around"),
        ("(?i)a", "no flags, no looking around"),
        ("(a)\\1", "\\\\1 is not supported"),
        ("\\bword", "\\\\b is not supported"),
        ("\\x6", "\\\\x needs 2 hexadecimal digits"),
        ("\\U00110000", "\\\\U needs 8 hexadecimal digits"),
        ("[^\\x00-\\U0010ffff]", "matches no text"),
        ("a{100000}", "more than 100000 states"),
        ("((a{300}){300}){300}", "more than 100000 states"),
        ("(a|b)*a(a|b){20}", "more than 10000 states"),
        ("(" * 60 + ")" * 60, "more than 50 groups within each other"),
    ],
)
def test_what_is_not_supported_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        compile_regex(pattern)


@pytest.mark.parametrize("pattern", ["(){1000000000}", "a{,9999999999}"])
def test_an_expression_that_would_run_for_minutes_is_refused(pattern):
    with pytest.raises(ValueError, match=f"more than {MAX_WORK} units of work to compile: use smaller numbers"):
        compile_regex(pattern)


@pytest.mark.parametrize(
    "pattern", ["((){1000000}){1000}", "((a?){99}){99}", "(a?){5000}", r"(\w+\s?){2000}", "(.*a.*){1000}"]
)
def test_work_that_grows_faster_than_the_states_is_bounded(pattern):
    with pytest.raises(ValueError, match="more than 500000 units of work to compile"):
        compile_regex(pattern, max_work=500_000)


@pytest.mark.parametrize(
    "pattern", ["a" * 50, "a|" * 50, f"[{'ab' * 25}]", "a{50}", "[a-é]{9}", "(a?){9}", "(a|b)*a(a|b){3}"]
)
def test_every_stage_counts_its_work_and_the_same_work_each_time(pattern):
    with pytest.raises(ValueError, match="units of work"):
        compile_regex(pattern, max_work=49)
    spent = []
    for _ in range(2):
        budget = Budget(pattern, 10_000)
        tree, parsed = parse(pattern, budget), budget.num_spent
        nfa, built = Nfa(tree, pattern, budget), budget.num_spent
        dfa, determinised = determinise(nfa, pattern, budget), budget.num_spent
        equivalent_states(dfa, budget)
        spent.append((parsed, built, determinised, budget.num_spent))
    assert spent[0] == spent[1] and 0 < parsed < built < determinised < budget.num_spent
    compile_regex(pattern, max_work=budget.num_spent)
    with pytest.raises(ValueError, match="units of work"):
        compile_regex(pattern, max_work=budget.num_spent - 1)


def test_expressions_of_hundreds_of_optional_parts_are_within_the_budget():
    assert len(compile_regex("(a?){300}").accepting) == 301
    assert len(compile_regex(r"(\w+\s?){20}").accepting) > 20


def test_an_error_shows_the_beginning_of_a_long_expression():
    with pytest.raises(ValueError) as error:
        compile_regex("a" * 1000 + ")")
    assert len(str(error.value)) < 300
