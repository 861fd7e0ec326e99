"""Stop strings: the scanner against a search by brute force, and whole sequences of tokens through it."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxserve.core.scheduler import Status
from jaxserve.engine.live_requests import LiveRequest, LiveSample, Update
from jaxserve.request import Request, SamplingParams
from jaxserve.text.stop_strings import StopScanner
from jaxserve.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.text import small_tokenizers

NONE = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search by brute force."""

    text: str  # all text that must be returned
    matched: str | None
    piece: int | None  # the piece that completed it


def search(pieces: list[tuple[str, bool]], stops: list[str], include: bool) -> SearchResult:
    """Looks at every end of the text in turn, and stops at the first one where a stop string ends and may end."""
    text = ""
    for index, (piece, may_stop) in enumerate(pieces):
        for character in piece:
            text += character
            for stop in stops:
                if may_stop and text.endswith(stop):
                    return SearchResult(text if include else text[: len(text) - len(stop)], stop, index)
    return SearchResult(text, None, None)


def longest_beginning(text: str, stops: list[str]) -> int:
    """Returns the number of characters at the end of a text with which a stop string begins."""
    beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


letters = st.text("ab", max_size=6)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
piece_lists = st.lists(st.tuples(letters, st.booleans() | st.just(True)), max_size=12)


@given(pieces=piece_lists, stops=stop_lists, include=st.booleans())
@example(pieces=[("a", False), ("b", True)], stops=["ab"], include=False)  # begins where none may end
@example(pieces=[("ab", False), ("ab", True)], stops=["ab"], include=False)
@example(pieces=[("aab", True)], stops=["aab", "b"], include=False)  # one character completes two: the first counts
@example(pieces=[("aab", True)], stops=["b", "aab"], include=False)
@example(pieces=[("abab", True)], stops=["bab", "ba"], include=False)  # the one that begins first ends last
@example(pieces=[("aa", True), ("b", True)], stops=["ab"], include=True)  # what was held back is not lost
def test_the_scanner_returns_the_text_of_a_search_by_brute_force(pieces, stops, include):
    scanner = StopScanner(stops, include=include)
    expected = search(pieces, stops, include)
    returned = ""
    for index, (piece, may_stop) in enumerate(pieces):
        returned += scanner.push(piece, may_stop=may_stop)
        so_far = "".join(piece for piece, _ in pieces[: index + 1])
        if expected.piece is not None and index >= expected.piece:
            assert scanner.matched == expected.matched and returned == expected.text
        else:
            assert scanner.matched is None
            assert returned == so_far[: len(so_far) - longest_beginning(so_far, stops)], "no more, no less is held back"
    assert returned + scanner.flush() == expected.text


@given(text=st.text("ab", max_size=30), stops=stop_lists, include=st.booleans(), cuts=st.lists(st.integers(1, 29)))
def test_where_a_text_is_cut_changes_nothing(text, stops, include, cuts):
    def whole(ends: list[int]) -> tuple[str, str | None]:
        scanner = StopScanner(stops, include=include)
        starts = [0, *ends]
        returned = "".join(scanner.push(text[a:b]) for a, b in zip(starts, [*ends, len(text)], strict=True))
        return returned + scanner.flush(), scanner.matched

    assert whole(sorted(cuts)) == whole([]) == whole(list(range(1, len(text))))


def test_nothing_is_held_back_without_stop_strings():
    scanner = StopScanner([])
    assert [scanner.push("ab"), scanner.push(""), scanner.flush()] == ["ab", "", ""]


# Whole sequences. "byte level" merges bytes across characters, "byte fallback" has bytes where it lacks a piece.
KINDS = ["byte level", "byte level, then another", "byte fallback", "metaspace"]
TEXTS = [*small_tokenizers.TEXTS, "é日é日日 😀 the cat😀", "日😀日é the  the\n"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return small_tokenizers.tokenizer_of(kind)


def prompt_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode("the"))


def live_sample(tokenizer: Tokenizer, params: SamplingParams) -> LiveSample:
    prompt = prompt_of(tokenizer)
    request = Request(id="r", prompt_token_ids=prompt, params=params)
    return LiveRequest(request, prompt, params, 0, tokenizer, eos_token_ids=(1,)).samples[0]


def generate(sample: LiveSample, token_ids: list[int], every: int = 1) -> list[Update]:
    """Appends all tokens, as if the device knew of no stop strings; returns the updates after every `every` tokens."""
    updates = []
    for index, token in enumerate(token_ids):
        last = index + 1 == len(token_ids)
        sample.append(token, 0.0, 1, NONE, NONE, Status.LENGTH if last else Status.RUNNING)
        if last:
            sample.finish(Status.LENGTH)
        if last or index % every == 0:
            updates.append(sample.take_update())
    return [update for update in updates if update is not None]


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], min_tokens: int) -> list[tuple[str, bool]]:
    """Returns the text that becomes final with each token, and the rest at the end."""
    decoder = IncrementalDecoder(tokenizer, context=prompt_of(tokenizer))
    pieces = [(decoder.push(token), number >= min_tokens) for number, token in enumerate(token_ids, 1)]
    return [*pieces, (decoder.flush(), len(token_ids) >= min_tokens)]


def check(tokenizer: Tokenizer, token_ids: list[int], params: SamplingParams, every: int = 1) -> SearchResult:
    """Runs a sample and compares it with the search by brute force."""
    sample = live_sample(tokenizer, params)
    updates = generate(sample, token_ids, every)
    expected = search(
        pieces_of(tokenizer, token_ids, params.min_tokens), list(params.stop_strings), params.include_stop_str_in_output
    )
    completion = sample.completion()
    assert completion.text == expected.text
    num_tokens = len(token_ids) if expected.piece is None else min(expected.piece + 1, len(token_ids))
    assert completion.token_ids == tuple(token_ids[:num_tokens]), (
        "what comes after the token that completes it is cut off"
    )
    assert completion.finish_reason == ("length" if expected.matched is None else "stop")
    assert completion.stop_reason == expected.matched
    assert "".join(update.text for update in updates) == completion.text, "nothing is taken back, nothing is lost"
    assert sum((update.token_ids for update in updates), ()) == completion.token_ids
    assert [update.output is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    return expected


@st.composite
def cases(draw, kind: str):
    """Tokens of a few kinds, and stop strings that are mostly parts of their text."""
    tokenizer = tokenizer_of(kind)
    text_ids = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=4).flatmap(
        lambda few: st.lists(st.sampled_from(few), min_size=1, max_size=16)
    )
    token_ids = draw(text_ids | some | st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=16))
    text = "".join(piece for piece, _ in pieces_of(tokenizer, token_ids, 0))
    stops: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        stops.append(text[start : start + draw(st.integers(1, 5))] + draw(st.sampled_from(["", "", "", "a", "é"])))
    params = SamplingParams(
        max_tokens=len(token_ids),
        min_tokens=draw(st.just(0) | st.integers(0, len(token_ids))),
        stop=tuple(stop for stop in stops if stop),
        include_stop_str_in_output=draw(st.booleans()),
    )
    return tokenizer, token_ids, params


@every_kind
@given(data=st.data(), every=st.integers(1, 4))
def test_a_sequence_of_random_tokens_stops_where_a_search_by_brute_force_does(kind, data, every):
    check(*data.draw(cases(kind)), every)


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_string_is_found_at_every_place_of_a_text_and_no_update_ends_within_a_character(kind, text):
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole = check(tokenizer, token_ids, SamplingParams(max_tokens=99)).text
    num_matches = 0
    for start in range(len(whole)):
        for size in (1, 2, 5):
            params = SamplingParams(max_tokens=99, stop=whole[start : start + size])
            num_matches += check(tokenizer, token_ids, params).matched is not None
            sample = live_sample(tokenizer, params)
            if "\ufffd" not in whole:
                assert not any("\ufffd" in update.text for update in generate(sample, token_ids))
    assert num_matches == 3 * len(whole)


def test_a_stop_string_may_span_tokens_and_end_within_one():
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("the cat sat on the mat, and", add_special_tokens=False)
    texts = [tokenizer.decode([token]) for token in ids]
    assert " sat" in texts and any(len(text) > 2 for text in texts), "tokens of several characters"
    sample = live_sample(tokenizer, SamplingParams(max_tokens=99, stop="t sa"))
    generate(sample, ids)
    completion = sample.completion()
    assert (completion.text, completion.stop_reason, completion.finish_reason) == ("the ca", "t sa", "stop")
    assert tokenizer.decode(completion.token_ids) == "the cat sat", "the token that completes it is whole, and the last"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_stop_string_of_characters_of_several_bytes_is_found_when_the_last_byte_has_come(kind):
    tokenizer = tokenizer_of(kind)
    names = "ð Ł ĺ Ģ" if kind == "byte level" else "<0xF0> <0x9F> <0x98> <0x80>"
    smile = [tokenizer.backend.token_to_id(name) for name in names.split()]
    a = tokenizer.backend.token_to_id("a")
    sample = live_sample(tokenizer, SamplingParams(max_tokens=99, stop="😀"))
    updates = generate(sample, [a, *smile, a, a])
    assert "".join(update.text for update in updates) == "a"
    # Byte fallback settles a run of bytes when it ends: one more token is needed there, and belongs to the sequence.
    assert sample.completion().token_ids == ((a, *smile) if kind == "byte level" else (a, *smile, a))


def test_of_two_completed_by_one_token_the_first_to_be_complete_wins_and_ties_go_by_the_list():
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("the cat sat", add_special_tokens=False)
    assert " sat" in [tokenizer.decode([token]) for token in ids]
    for stops, matched in [
        (("at", " s"), "at"),
        ((" sat", "sa"), "sa"),
        (("sat", "t sat"), "sat"),
        (("t sat", "sat"), "t sat"),
    ]:
        sample = live_sample(tokenizer, SamplingParams(max_tokens=99, stop=stops))
        generate(sample, ids)
        assert sample.completion().stop_reason == matched


def test_nothing_stops_the_sequence_before_min_tokens_and_what_begins_before_may_end_after():
    tokenizer = tokenizer_of("byte level")
    a, b = (tokenizer.backend.token_to_id(letter) for letter in "ab")
    sample = live_sample(tokenizer, SamplingParams(max_tokens=99, min_tokens=3, stop=("ab", "ba")))
    generate(sample, [a, b, a, b, a])
    assert sample.completion().text == "a" and sample.completion().token_ids == (a, b, a)
    assert sample.completion().stop_reason == "ba"


def test_a_character_that_never_becomes_whole_can_complete_a_stop_string_at_the_end():
    tokenizer = tokenizer_of("byte level")
    a, first_byte = tokenizer.backend.token_to_id("a"), tokenizer.backend.token_to_id("ð")
    sample = live_sample(tokenizer, SamplingParams(max_tokens=2, stop="a\ufffd"))
    generate(sample, [a, first_byte])
    completion = sample.completion()
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", "a\ufffd")


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_string_is_left_in_if_asked_for_and_what_its_token_has_beyond_it_is_not(include):
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("the cat sat", add_special_tokens=False)
    sample = live_sample(tokenizer, SamplingParams(max_tokens=99, stop=" s", include_stop_str_in_output=include))
    generate(sample, ids)
    assert sample.completion().text == ("the cat s" if include else "the cat")


def test_a_seeded_defect_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """The control: a scanner that holds back one character too few returns text that is part of a stop string."""
    monkeypatch.setattr(
        StopScanner, "_num_started", lambda self, stop: max(0, longest_beginning(self._held, [stop]) - 1)
    )
    with pytest.raises(AssertionError):
        test_a_stop_string_may_span_tokens_and_end_within_one()
