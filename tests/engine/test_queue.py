"""The queue of requests: order, room, aborts, and that work per call does not grow with the requests in it."""

import asyncio
import random

import pytest

from jaxserve import AsyncEngine, Engine, QueueFullError, SamplingParams, Update
from jaxserve.engine import intake
from jaxserve.engine.intake import Intake
from jaxserve.engine.live_requests import LiveRequest
from jaxserve.engine.mailboxes import Mailboxes
from jaxserve.engine.queue import RequestQueue
from tests import small_model
from tests.engine.serving import CONFIG, LONG, PATIENCE, SHORT, reconfigure


def make_queue(max_waiting: int | None = None) -> RequestQueue:
    return RequestQueue(Intake(small_model.MODEL, CONFIG, None, (), seed=0, aux=None), max_waiting)


def test_requests_leave_in_order_of_priority_and_arrival_whatever_was_aborted_meanwhile() -> None:
    rng, queue, expected = random.Random(0), make_queue(), []
    for number in range(300):
        if rng.random() < 0.6:
            priority = rng.randrange(3)
            queue.add(live := queue.accept([1], SHORT, None, priority))
            expected.append((priority, number, live))
        if rng.random() < 0.3 and expected:
            queue.abort(rng.choice(expected)[2].id)
            queue.abort("no such request")
            aborted = {live.id for live in queue.pop_aborted()}
            assert len(aborted) <= 1
            for live in [live for _, _, live in expected if live.id in aborted]:
                queue.remove(live)
            expected = [entry for entry in expected if entry[2].id not in aborted]
        if rng.random() < 0.1:
            room = rng.randrange(1, 4)
            first, expected = sorted(expected)[:room], sorted(expected)[room:]
            assert [sample.live for sample in queue.pop(room)] == [live for _, _, live in first]
        assert queue.num_waiting == queue.num_waiting_samples == len(expected)
        assert len(queue._heap) <= 2 * len(expected) + 1


def test_nothing_overtakes_a_request_whose_samples_do_not_fit() -> None:
    queue = make_queue()
    for number in (1, 3, 1):
        queue.add(queue.accept([1], SamplingParams(n=number)))
    assert queue.num_waiting_samples == 5
    assert len(queue.pop(3)) == 1 and queue.pop(2) == []
    assert len(queue.pop(4)) == 4 and queue.num_waiting == queue.num_waiting_samples == 0


def test_an_abort_of_a_request_that_left_the_queue_is_for_the_device() -> None:
    queue = make_queue()
    queue.add(live := queue.accept([1], SHORT))
    queue.pop(1)
    queue.abort(live.id)
    assert live.abort_requested and queue.pop_aborted() == []


def test_prompt_log_probabilities_are_wanted_while_a_request_on_the_device_asks_for_them() -> None:
    queue = make_queue()
    asking = queue.accept([1, 2], SamplingParams(prompt_logprobs=0))
    queue.add(asking)
    assert not queue.wants_prompt_logprobs
    queue.pop(1)
    assert queue.wants_prompt_logprobs
    queue.remove(asking)
    assert not queue.wants_prompt_logprobs


def test_a_full_queue_refuses_a_prompt_before_it_is_tokenised(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reconfigure(engine, monkeypatch, max_waiting=1)
    encoded: list[str] = []
    encode = engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **_: encoded.append(text) or encode(text))
    engine.add_request("the cat", SHORT)
    for refuse in (engine.add_request, lambda *args: next(engine.stream(*args))):
        with pytest.raises(QueueFullError):
            refuse("the dog", SHORT)
    assert encoded == ["the cat"]
    while engine.has_work:
        engine.step()
    reconfigure(engine, monkeypatch, max_waiting=0)
    with AsyncEngine(engine) as asynchronous:
        with pytest.raises(QueueFullError):
            asynchronous.submit("the dog", SHORT)
        with pytest.raises(QueueFullError):
            asyncio.run(asyncio.wait_for(anext(asynchronous.stream("the dog", SHORT)), PATIENCE))
        assert encoded == ["the cat"]


class CountingRequest(LiveRequest):
    """Counts how often an attribute of any such request is read."""

    num_reads = 0

    def __getattribute__(self, name: str) -> object:
        CountingRequest.num_reads += 1
        return super().__getattribute__(name)


class CountingDict(dict):
    """Counts the entries that are gone through."""

    num_visited = 0

    def __iter__(self):
        CountingDict.num_visited += len(self)
        return super().__iter__()

    def keys(self):
        CountingDict.num_visited += len(self)
        return super().keys()

    def values(self):
        CountingDict.num_visited += len(self)
        return super().values()

    def items(self):
        CountingDict.num_visited += len(self)
        return super().items()


def work_of_steps(engine: Engine, num_waiting: int) -> tuple[int, int]:
    """Reads of requests and entries visited in steps of a stream, and of an abort, with so many requests in the queue."""
    engine.queue.unfinished = CountingDict(engine.queue.unfinished)
    stream = engine.stream([1, 2], LONG, steps_per_call=1, priority=-1)
    next(stream)
    for index in range(num_waiting):
        engine.add_request([3], SHORT, id=str(index), priority=1)
    for index in range(4):  # so that no slot is free for those
        engine.add_request([3], LONG, id=f"running {index}")
    for _ in range(8):
        next(stream)
    CountingRequest.num_reads = CountingDict.num_visited = 0
    for _ in range(10):
        next(stream)
    engine.abort("0")
    for _ in range(3):
        next(stream)
    counted = CountingRequest.num_reads, CountingDict.num_visited
    stream.close()
    for request_id in list(engine.queue.unfinished):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return counted


def test_the_work_of_a_call_does_not_grow_with_the_requests_that_wait(engine, monkeypatch) -> None:
    monkeypatch.setattr(intake, "LiveRequest", CountingRequest)
    few, many = work_of_steps(engine, 20), work_of_steps(engine, 400)
    assert few[0] > 0 and many == few
    assert few[1] == 0


def test_updates_of_other_callers_cost_nothing_until_they_are_taken() -> None:
    boxes = Mailboxes()
    mine = boxes.open(["a", "b"])
    boxes.put(updates_of("a", "x", "b", "x"))
    assert [update.request_id for update in mine] == ["a", "b"] and boxes.has_updates
    mine.clear()
    assert [update.request_id for update in boxes.take_all()] == ["x", "x"] and not boxes.has_updates
    boxes.put(updates_of("a", "b"))
    boxes.close(mine, ["a", "b"])
    boxes.put(updates_of("b"))
    assert [update.request_id for update in boxes.take_all()] == ["a", "b", "b"]


def updates_of(*request_ids: str) -> list[Update]:
    return [Update(request_id, "", (1,)) for request_id in request_ids]
