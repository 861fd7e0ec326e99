"""Requests that come and go from one place: ids, streams, a full queue, aborts at every step."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from jaxserve import Engine, QueueFullError, Request, RequestOutput, Update
from jaxserve.core.scheduler import Status
from tests.engine.serving import (
    CONFIG,
    LONG,
    SHORT,
    check_updates,
    make_prompts,
    num_free_pages,
    reconfigure,
    same,
    tokens_of,
)


def test_an_id_is_made_up_where_none_is_given_and_never_one_in_use(engine: Engine) -> None:
    taken = f"request-{next(engine.queue.intake.numbers) + 2}"
    assert engine.add_request([1, 2], SHORT, id=taken) == taken
    names = [engine.add_request("the cat", SHORT), engine.add_request([3], SHORT)]
    assert engine.add_request(Request(id="mine", prompt_token_ids=(4,), params=SHORT)) == "mine"
    ended = collections.Counter()
    while engine.has_unfinished:
        ended.update(update.request_id for update in engine.step() if update.output is not None)
    assert ended == dict.fromkeys([taken, *names, "mine"], 1) and len(ended) == 4


def test_a_whole_request_with_more_arguments_is_refused(engine: Engine) -> None:
    request = Request(id="whole", prompt_token_ids=(4,), params=SHORT)
    for more in ({"params": SHORT}, {"id": "other"}, {"priority": 1}):
        with pytest.raises(ValueError, match="'whole' has params, id and priority of its own"):
            engine.add_request(request, **more)
    assert not engine.has_unfinished


def test_a_stream_is_the_result_piece_by_piece_and_others_go_on_beside_it(engine: Engine) -> None:
    (expected,) = engine.generate(["the cat"], LONG)
    other = engine.add_request("the mat", SHORT)
    updates = list(engine.stream("the cat", LONG, id="mine", steps_per_call=1))
    assert same(check_updates(updates), expected) and len(updates) > 50
    assert all(update.request_id == "mine" for update in updates)
    assert [update.request_id for update in engine.step() if update.output is not None] == [other]


def test_a_stream_closed_early_aborts_its_request(engine: Engine) -> None:
    updates = engine.stream([1, 2], LONG, steps_per_call=1)
    next(updates)
    updates.close()
    (ended,) = [update for _ in range(3) for update in engine.step(1) if update.output is not None]
    assert ended.output.outputs[0].finish_reason == "abort"


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconfigure(engine, monkeypatch, max_waiting=2)
    for _ in range(2):
        engine.add_request([1], SHORT)
    for add in (engine.add_request, lambda *args: next(engine.stream(*args))):
        with pytest.raises(QueueFullError, match=r"2 requests wait, and no more than max_waiting=2 may: .* or raise"):
            add([1], SHORT)
    engine.step()
    engine.add_request([1], SHORT)
    num_ended = 0
    while engine.has_unfinished:
        num_ended += sum(update.output is not None for update in engine.step())
    assert num_ended == 3


def test_more_prompts_than_the_bound_of_the_queue_are_generated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(15)
    expected = engine.generate(prompts, SHORT)
    reconfigure(engine, monkeypatch, max_waiting=2)
    assert all(map(same, engine.generate(prompts, SHORT), expected))
    requests = [Request(id=str(i), prompt_token_ids=tuple(ids), params=SHORT) for i, ids in enumerate(prompts)]
    results = {update.request_id: update.output for update in engine.serve(requests) if update.output is not None}
    assert all(same(results[str(index)], output) for index, output in enumerate(expected))


def test_a_stream_whose_end_another_caller_was_told_raises_and_does_not_wait_for_ever(engine: Engine) -> None:
    updates = engine.stream([1, 2], SHORT, id="mine", steps_per_call=1)
    next(updates)
    while engine.has_unfinished:
        engine.step()
    with pytest.raises(RuntimeError, match="mine: the end of these was told to another caller"):
        list(updates)


def test_a_stream_has_no_hold_on_another_request_that_got_the_id_of_its_own(engine: Engine) -> None:
    (expected,) = engine.generate([[3, 4]], LONG)
    for leave in ("closed", "read on"):
        stream = engine.stream([1, 2], SHORT, id="mine", steps_per_call=1)
        next(stream)
        while engine.has_work:
            engine.step()
        later = engine.stream([3, 4], LONG, id="mine", steps_per_call=1)
        updates = [next(later)]
        if leave == "closed":
            stream.close()
        else:
            with pytest.raises(RuntimeError, match="mine: the end of these was told to another caller"):
                next(stream)
        assert same(check_updates(updates + list(later)), expected)


def test_updates_after_a_told_end_are_not_those_of_the_stream_that_missed_it(engine: Engine) -> None:
    stream, other = (engine.stream([1, 2], SHORT, id=name, steps_per_call=1) for name in ("mine", "other"))
    next(stream)
    while engine.has_work:
        engine.step()
    engine.add_request([3, 4], SHORT, id="mine")
    assert check_updates(list(other)).request_id == "other"
    with pytest.raises(RuntimeError, match="mine: the end of these was told to another caller"):
        list(stream)
    updates: list[Update] = []
    while engine.has_work:
        updates += engine.step()
    assert check_updates(updates).prompt_token_ids == (3, 4)


def test_an_id_may_be_used_again_while_the_device_still_runs_the_request_that_had_it(engine: Engine) -> None:
    """A stop string ends a request on the host; its row runs on until the device hears of that."""
    (free,) = engine.generate(["the cat"], LONG)
    (expected,) = engine.generate([[3, 4]], SHORT)
    engine.add_request("the cat", dataclasses.replace(LONG, stop=free.outputs[0].text[3:6]), id="again")
    engine.reset_stats()
    results: list[RequestOutput] = []
    while engine.has_unfinished:
        for update in engine.step(1):
            if update.output is not None:
                results.append(update.output)
                if len(results) == 1:
                    assert engine.driver.samples_by_row
                    engine.add_request([3, 4], SHORT, id="again")
    assert [output.outputs[0].finish_reason for output in results] == ["stop", "length"]
    assert same(results[1], expected) and engine.stats.num_requests == 2


def test_a_stop_string_of_the_last_request_frees_its_pages_too(engine: Engine) -> None:
    (free,) = engine.generate(["the cat"], LONG)
    text = free.outputs[0].text
    (stopped,) = engine.generate(["the cat"], dataclasses.replace(LONG, stop=text[3:6]))
    assert stopped.outputs[0].text == text[: text.index(text[3:6])] and engine.has_work
    for _ in range(3):
        engine.step()
    assert not engine.has_work and num_free_pages(engine) == CONFIG.num_pages


# Aborts at every step of a small trace, step by step, with the invariants of the state checked each time.

TRACE = [([5] * 38, 16), ([6] * 37, 16), ([7] * 36, 14), ([8] * 20, 8), ([9] * 3, 5), ([10] * 5, 3), ([11] * 2, 3)]


def play_trace(engine: Engine, victim: str | None, abort_at: int) -> tuple[dict[str, RequestOutput], str, int]:
    """Serves `TRACE` one step at a time and aborts one request.

    Returns:
      results; the state that the victim was in; the number of steps.
    """
    for index, (prompt, max_tokens) in enumerate(TRACE):
        params = dataclasses.replace(LONG, max_tokens=max_tokens)
        engine.add_request(prompt, params, id=str(index), priority=int(index == 6))
    results: dict[str, RequestOutput] = {}
    state, num_steps = "", 0
    while engine.has_work:
        if num_steps == abort_at:
            state = state_of(engine, victim, results)
            engine.abort(victim)
            engine.abort(victim)
        updates = engine.step(1)
        for update in updates:
            assert update.request_id not in results, "nothing comes after the end"
            if update.output is not None:
                results[update.request_id] = update.output
        if num_steps == abort_at:
            assert victim in results, "the step that sees the abort tells of it"
            held = {
                engine.driver.samples_by_row[int(row)].live.id
                for row in engine.driver.state.slots.row_id
                if row < CONFIG.queue_size
            }
            assert victim not in held and num_pages_of_slots(engine) == CONFIG.num_pages - num_free_pages(engine)
        num_steps += 1
    assert num_free_pages(engine) == CONFIG.num_pages
    return results, state, num_steps


def state_of(engine: Engine, victim: str, results: dict[str, RequestOutput]) -> str:
    if victim in results:
        return "finished"
    rows = [row for row, sequence in engine.driver.samples_by_row.items() if sequence.live.id == victim]
    if not rows:
        return "waiting on the host"
    queue, slots = jax.device_get((engine.driver.state.queue, engine.driver.state.slots))
    (row,) = rows
    if queue.status[row] == Status.WAITING:
        return "preempted" if queue.num_preemptions[row] else "waiting on the device"
    (slot,) = np.flatnonzero(slots.row_id == row)
    return "mid-prefill" if slots.num_computed[slot] < queue.num_tokens[row] - 1 else "decoding"


def num_pages_of_slots(engine: Engine) -> int:
    page_ids = np.asarray(engine.driver.state.table.page_ids)
    return len(np.unique(page_ids[page_ids < CONFIG.num_pages]))


def test_an_abort_at_any_step_and_in_any_state_ends_one_request_once_and_disturbs_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconfigure(engine, monkeypatch, debug_checks=True)
    expected, _, num_steps = play_trace(engine, None, -1)
    assert any(output.metrics.num_preemptions for output in expected.values())
    seen = collections.Counter()
    for index in range(len(TRACE)):
        for abort_at in range(num_steps):
            results, state, _ = play_trace(engine, str(index), abort_at)
            seen[state] += 1
            assert results.keys() == expected.keys()
            for name, output in results.items():
                (tokens,), (wanted,) = tokens_of(output), tokens_of(expected[name])
                if name == str(index) and state != "finished":
                    assert output.outputs[0].finish_reason == "abort" and tokens == wanted[: len(tokens)]
                else:
                    assert output.outputs[0].finish_reason == "length" and tokens == wanted
    states = "waiting on the host", "waiting on the device", "mid-prefill", "decoding", "preempted", "finished"
    assert set(seen) == set(states), f"{seen} lacks a state"
