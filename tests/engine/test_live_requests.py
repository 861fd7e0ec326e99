"""The host's side of a request: its tokens, stop reasons, log probabilities, samples and updates.

Stop strings have a file of their own, `test_stop_strings.py`.
"""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.scheduler import Status
from jaxserve.engine.live_requests import LiveRequest, LiveSample
from jaxserve.request import Request, SamplingParams
from jaxserve.text.tokenizer import Tokenizer
from tests.text import small_tokenizers

EOS = 1  # "</s>", a special token
NOTHING = (0.0, 1, np.zeros(0, np.int32), np.zeros(0))


@functools.cache
def tokenizer_of(kind: str = "byte level") -> Tokenizer:
    return small_tokenizers.tokenizer_of(kind)


def live_request(prompt: str = "the", *, tokenizer: Tokenizer | None = None, **params) -> LiveRequest:
    tokenizer = tokenizer or tokenizer_of()
    sampling_params = SamplingParams(**{"max_tokens": 99} | params)
    prompt_token_ids = tuple(tokenizer.encode(prompt))
    request = Request(id="r", prompt=prompt, params=sampling_params)
    return LiveRequest(request, prompt_token_ids, sampling_params, 7, tokenizer, eos_token_ids=(EOS,))


def push(sample: LiveSample, token_ids: list[int], status: Status = Status.RUNNING) -> None:
    """Appends tokens as a call of the device does; `status` comes with the last one."""
    for token in token_ids[:-1]:
        sample.append(token, *NOTHING, Status.RUNNING)
    sample.append(token_ids[-1], *NOTHING, status)
    if status >= Status.STOP:
        sample.finish(status)


def encode(text: str) -> list[int]:
    return tokenizer_of().encode(text, add_special_tokens=False)


@given(
    tokens=st.lists(st.integers(0, 400), min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 6)),
    skip=st.booleans(),
)
def test_updates_add_up_to_the_text_of_all_tokens(tokens, sizes, skip):
    sample = live_request(skip_special_tokens=skip).samples[0]
    updates = []
    for size in itertools.chain(sizes, itertools.repeat(3)):
        push(sample, tokens[:size], Status.LENGTH if size >= len(tokens) else Status.RUNNING)
        updates.append(sample.take_update())
        tokens = tokens[size:]
        if not tokens:
            break
    completion = sample.completion()
    assert all(updates) and [update.output is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    assert "".join(update.text for update in updates) == completion.text
    assert sum((update.token_ids for update in updates), ()) == completion.token_ids
    prompt_ids = tokenizer_of().encode("the")
    whole = tokenizer_of().decode([*prompt_ids, *completion.token_ids], skip_special_tokens=skip)
    assert "the" + completion.text == whole
    assert sample.take_update() is None


def test_there_is_no_update_without_news():
    sample = live_request().samples[0]
    assert sample.take_update() is None
    push(sample, encode("a"))
    assert sample.take_update().text == "a"
    assert sample.take_update() is None


def test_half_a_character_is_a_token_without_text_yet():
    sample = live_request().samples[0]
    ids = [tokenizer_of().backend.token_to_id(name) for name in ("ð", "Ł", "ĺ", "Ģ")]
    texts = []
    for token in ids:
        push(sample, [token])
        update = sample.take_update()
        texts.append(update.text)
        assert update.token_ids == (token,)
    assert texts == ["", "", "", "😀"]


def test_without_detokenisation_there_are_tokens_and_no_text():
    sample = live_request(detokenize=False, logprobs=0).samples[0]
    push(sample, encode("a"), Status.LENGTH)
    completion = sample.completion()
    assert completion.text == "" and completion.token_ids == tuple(encode("a"))
    assert next(iter(completion.logprobs[0].values())).decoded_token is None


@pytest.mark.parametrize(
    ("params", "last", "reason", "has_text"),
    [
        ({}, EOS, None, False),
        ({"stop_token_ids": (EOS,)}, EOS, None, False),  # end-of-sequence is tested first
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, EOS, False),
        ({"ignore_eos": True, "stop": [[EOS]]}, EOS, (EOS,), True),  # a token like others, and so is its text
        ({"stop_token_ids": (5,)}, 5, 5, False),
        ({"stop": [[7], [6, 5], [5]]}, 5, (6, 5), True),  # the first of the list that matches
        ({"stop": [[5], [6, 5]]}, 5, (5,), True),
    ],
)
def test_what_ended_the_sequence_is_the_reason_and_only_a_stop_token_has_no_text(params, last, reason, has_text):
    sample = live_request(skip_special_tokens=False, **params).samples[0]
    push(sample, [6, last], Status.STOP)
    completion = sample.completion()
    assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)
    assert completion.token_ids == (6, last)
    assert completion.text == tokenizer_of().decode([6, last] if has_text else [6], skip_special_tokens=False)


def test_a_stop_token_is_text_where_it_does_not_end_the_sequence():
    """With min_tokens the device lets end-of-sequence tokens of a stop list pass; their status says so."""
    sample = live_request(skip_special_tokens=False, ignore_eos=True).samples[0]
    push(sample, [EOS, 6, EOS], Status.LENGTH)
    assert sample.completion().text == tokenizer_of().decode([EOS, 6, EOS], skip_special_tokens=False)
    assert sample.completion().stop_reason is None


@pytest.mark.parametrize("status", [Status.STOP, Status.LENGTH, Status.ABORT, Status.ERROR])
def test_a_sequence_ends_once(status):
    sample = live_request().samples[0]
    push(sample, encode("ab"), status)
    before = sample.completion()
    finish_time = sample.finish_time
    for other in (Status.STOP, Status.LENGTH, Status.ABORT, Status.ERROR):
        push(sample, encode("c"), other)
    assert sample.completion() == before and sample.finish_time == finish_time
    assert before.finish_reason == status.finish_reason


def test_an_aborted_sequence_has_all_that_was_generated_also_what_a_stop_string_held_back():
    sample = live_request(stop="bc").samples[0]
    push(sample, encode("ab"))
    assert sample.take_update().text == "a"
    sample.finish(Status.ABORT)
    update = sample.take_update()
    assert (update.text, update.token_ids) == ("b", ())
    (completion,) = update.output.outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ab", "abort", None)


def test_a_sequence_aborted_before_its_first_token_ends_with_nothing():
    live = live_request()
    live.finish(Status.ABORT)
    update = live.samples[0].take_update()
    assert (update.text, update.token_ids) == ("", ())
    assert update.output.outputs[0].finish_reason == "abort"
    assert update.output.metrics.first_token_time is None and update.output.metrics.finish_time is not None


def test_a_failed_request_says_why():
    live = live_request()
    live.finish(Status.ERROR)
    output = live.samples[0].take_update().output
    assert "not finite" in output.error and output.outputs[0].finish_reason == "error"


TOP_IDS, TOP_LOGPROBS = np.array([4, 3, 9, -1]), np.array([-0.5, -1.5, -2.5, -np.inf])


@pytest.mark.parametrize(
    ("num_logprobs", "token", "expected"),
    [
        (0, 9, {9: 3}),
        (1, 4, {4: 1}),
        (1, 9, {9: 3, 4: 1}),
        (2, 3, {4: 1, 3: 2}),
        (4, 9, {4: 1, 3: 2, 9: 3}),  # an id of -1 stands for no token
    ],
)
def test_log_probabilities_are_of_the_sampled_token_and_of_as_many_as_were_asked_for(num_logprobs, token, expected):
    sample = live_request(logprobs=num_logprobs).samples[0]
    logprob = float(TOP_LOGPROBS[list(TOP_IDS).index(token)])
    for _ in range(2):
        sample.append(token, logprob, expected[token], TOP_IDS, TOP_LOGPROBS, Status.RUNNING)
    completion = sample.completion()
    assert len(completion.logprobs) == 2
    for places in completion.logprobs:
        assert {token_id: place.rank for token_id, place in places.items()} == expected
        for token_id, place in places.items():
            assert place.logprob == TOP_LOGPROBS[list(TOP_IDS).index(token_id)]
            assert place.decoded_token == tokenizer_of().decode_token(token_id)
    assert completion.cumulative_logprob == 2 * logprob


def test_log_probabilities_are_missing_unless_a_request_asks_for_them():
    sample = live_request().samples[0]
    sample.append(4, -0.5, 1, TOP_IDS, TOP_LOGPROBS, Status.RUNNING)
    assert sample.completion().logprobs is None and sample.completion().cumulative_logprob is None


def test_prompt_log_probabilities_are_kept_by_position_and_the_first_token_has_none():
    live = live_request("the cat", prompt_logprobs=1)
    num_tokens = len(live.prompt_token_ids)
    for position in [*range(1, num_tokens), 1]:  # a row that is computed again says the same again
        live.add_prompt_logprob(position, -3.0, 8, TOP_IDS, TOP_LOGPROBS)
    places = live.output().prompt_logprobs
    assert places[0] is None and len(places) == num_tokens
    for token, place in zip(live.prompt_token_ids[1:], places[1:], strict=True):
        assert place[4].rank == 1 and set(place) == {4, token}
    assert live_request().output().prompt_logprobs is None


@given(order=st.permutations(range(3)), taken_together=st.booleans(), data=st.data())
def test_of_several_samples_exactly_one_update_has_the_result_and_it_is_the_last(order, taken_together, data):
    live = live_request(n=3)
    updates = []
    for index in order:
        push(live.samples[index], encode("a" * (index + 1)), data.draw(st.sampled_from(list(Status)[3:])))
        if not taken_together:
            updates.append(live.samples[index].take_update())
    if taken_together:
        updates = [live.samples[index].take_update() for index in order]
    assert [update.index for update in updates] == order
    assert [update.output is not None for update in updates] == [False, False, True]
    output = updates[-1].output
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for update in updates:
        assert update.text == output.outputs[update.index].text
        assert update.token_ids == output.outputs[update.index].token_ids
    assert live.finished and not any(sample.has_news for sample in live.samples)


def test_a_request_is_not_finished_while_one_of_its_samples_is_not():
    live = live_request(n=2)
    push(live.samples[0], encode("a"), Status.LENGTH)
    assert not live.finished and live.samples[0].take_update().output is None
    assert live.output().metrics.finish_time is None
    live.finish(Status.ABORT)
    assert live.finished
    assert [completion.finish_reason for completion in live.output().outputs] == ["length", "abort"]


def test_metrics_are_in_order_and_of_all_samples():
    live = live_request(n=2)
    for sample, number in zip(live.samples, (2, 3), strict=True):
        sample.num_preemptions = number
        push(sample, encode("a"), Status.LENGTH)
    metrics = live.output().metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finish_time
    assert metrics.first_token_time == live.samples[0].first_token_time
    assert metrics.finish_time == live.samples[1].finish_time
    assert metrics.num_preemptions == 5


@pytest.mark.parametrize(
    ("params", "seed"), [({"temperature": 0}, None), ({"temperature": 0, "seed": 7}, 7), ({}, 7), ({"seed": 7}, 7)]
)
def test_the_seed_is_reported_where_one_can_replay_the_request(params, seed):
    assert live_request(**params).output().seed == seed


def test_the_first_word_continues_the_prompt():
    tokenizer = tokenizer_of("byte fallback")
    live = live_request("the", tokenizer=tokenizer)
    push(live.samples[0], tokenizer.encode("cat", add_special_tokens=False), Status.LENGTH)
    assert live.output().outputs[0].text == " cat"
