"""The Engine for long-lived use: requests that come and go from one place, from tasks of an event loop, and from threads."""

import asyncio
import collections
import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from jaxserve import Engine, EngineConfig, Request, RequestOutput, SamplingParams, Update
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.scheduler import Status
from jaxserve.engine import AsyncEngine, EngineClosedError, QueueFullError, RequestFailedError, RequestHandle
from tests import small_model

CONFIG = EngineConfig(**small_model.CAPACITIES)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = dataclasses.replace(LONG, max_tokens=5)
PATIENCE = 60  # seconds; only a defect waits that long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def warm_engine(checkpoint: pathlib.Path) -> Engine:
    engine = Engine.from_pretrained(str(checkpoint), dtype="float32", config=CONFIG)
    engine.warm_up()
    return engine


@pytest.fixture
def engine(warm_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Nothing may be compiled, in whatever thread; afterwards nothing is left behind."""
    step = warm_engine.step

    def guarded(max_steps: int | None = None) -> list[Update]:
        with forbid_compilation():
            return step(max_steps)

    monkeypatch.setattr(warm_engine, "step", guarded)
    yield warm_engine
    while warm_engine.has_work:
        warm_engine.step()
    assert num_free_pages(warm_engine) == CONFIG.num_pages and warm_engine._owner is None


def reconfigure(engine: Engine, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    """Sets options that no program is compiled for: `max_waiting` and `debug_checks`."""
    for name, value in fields.items():
        monkeypatch.setattr({"max_waiting": engine.queue, "debug_checks": engine._loop}[name], name, value)


def num_free_pages(engine: Engine) -> int:
    return int(engine.driver.state.table.num_free)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def make_prompts(number: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [rng.integers(1, small_model.MODEL.vocab_size, size).tolist() for size in rng.integers(1, longest, number)]


def tokens_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in output.outputs]


def all_kinds_of_params() -> list[SamplingParams]:
    """Every sampling parameter, alone and together."""
    each = [
        {"temperature": 0},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"n": 3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": {5: 20.0, 6: 20.0}},
        {"allowed_token_ids": (10, 11, 12, 13)},
        {"bad_words": ("a", "the cat")},
        {"min_tokens": 9, "max_tokens": 12},
        {"stop": ("e", "at", "th")},
        {"stop": ("e",), "include_stop_str_in_output": True},
        {"stop": ([7], [9, 8])},
        {"stop_token_ids": tuple(range(40, 46))},
        {"logprobs": 3},
        {"logprobs": 0, "logprobs_mode": "processed"},
        {"prompt_logprobs": 2},
        {"truncate_prompt_tokens": 4},
        {"detokenize": False},
        {"skip_special_tokens": False, "ignore_eos": True},
        {"n": 2, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 1, "stop": ("s",), "min_tokens": 2},
    ]
    return [
        SamplingParams(**{"seed": index, "max_tokens": 10 + index % 7} | fields) for index, fields in enumerate(each)
    ]


def check_updates(updates: list[Update]) -> RequestOutput:
    """What holds of the updates of one request; returns the result."""
    assert [update.output is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    output = updates[-1].output
    for completion in output.outputs:
        mine = [update for update in updates if update.index == completion.index]
        assert "".join(update.text for update in mine) == completion.text
        assert sum((update.token_ids for update in mine), ()) == completion.token_ids
    return output


def same(one: RequestOutput, other: RequestOutput) -> bool:
    """All but when it happened and what it was called."""
    return dataclasses.replace(one, request_id="", metrics=None) == dataclasses.replace(
        other, request_id="", metrics=None
    )


# One place: the Engine itself.


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


# Tasks and threads.


async def collect(engine: AsyncEngine, *args, **kwargs) -> list[Update]:
    return [update async for update in engine.stream(*args, **kwargs)]


def test_streams_of_many_tasks_and_threads_give_what_generate_does(engine: Engine) -> None:
    params = all_kinds_of_params()
    prompts = make_prompts(len(params))
    with forbid_compilation():
        expected = engine.generate(prompts, params)

    async def by_tasks(asynchronous: AsyncEngine) -> list[list[Update]]:
        streams = [collect(asynchronous, *request) for request in zip(prompts, params, strict=True)]
        return await asyncio.gather(*streams)

    from_threads: list[list[Update]] = [[] for _ in prompts]
    with AsyncEngine(engine, steps_per_call=3) as asynchronous:

        def by_thread(start: int) -> None:
            for index in range(start, len(prompts), 4):
                from_threads[index] = list(asynchronous.submit(prompts[index], params[index]))

        threads = [threading.Thread(target=by_thread, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        from_tasks = asyncio.run(by_tasks(asynchronous))
        for thread in threads:
            thread.join()
        together = asyncio.run(asynchronous.generate(prompts, params))
    for index, output in enumerate(expected):
        assert same(check_updates(from_tasks[index]), output)
        assert same(check_updates(from_threads[index]), output)
        assert same(together[index], output)


def test_text_prompts_and_ids_and_priorities_are_taken(engine: Engine) -> None:
    (expected,) = engine.generate(["the cat"], SHORT)

    async def main() -> None:
        async with AsyncEngine(engine) as asynchronous:
            updates = await collect(asynchronous, "the cat", SHORT, id="mine", priority=-1)
            assert {update.request_id for update in updates} == {"mine"} and same(check_updates(updates), expected)
            (alone,) = await asynchronous.generate("the cat", SHORT)
            assert same(alone, expected)
            with pytest.raises(ValueError, match="prompt 1: the prompt has no tokens"):
                await asynchronous.generate(["a", ""], SHORT)
            with pytest.raises(ValueError, match="token ids go from 0 to 299"):
                await collect(asynchronous, [300], SHORT)
            assert asynchronous.stats().num_waiting == asynchronous.stats().num_running == 0

    asyncio.run(main())


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    with AsyncEngine(engine) as asynchronous:
        first = asynchronous.submit([1, 2], LONG, id="same")
        with pytest.raises(ValueError, match="'same' is in use"):
            asynchronous.submit([1, 2], LONG, id="same")
        assert first.result(PATIENCE).outputs[0].finish_reason == "length"
        again = asynchronous.submit([1, 2], LONG, id="same")
        first.abort()  # has finished: the other request of this id is not touched
        asynchronous._abort(first)  # as if it had been asked for just before it finished
        assert again.result(PATIENCE).outputs[0].finish_reason == "length"


class Gate:
    """Holds the engine thread before each step until it is opened; counts steps and ends."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.open = threading.Event()
        self.num_steps = 0
        self.ends: dict[str, list[str]] = {}  # reasons
        self._permits = threading.Semaphore(0)
        self._step = engine.step
        monkeypatch.setattr(engine, "step", self._gated)

    def let_through(self, number: int) -> None:
        for _ in range(number):
            self._permits.release()

    def _gated(self, max_steps: int | None = None) -> list[Update]:
        while not self.open.is_set() and not self._permits.acquire(timeout=0.005):
            pass
        updates = self._step(max_steps)
        self.num_steps += 1
        for update in updates:
            if update.output is not None:
                reason = update.output.outputs[0].finish_reason
                self.ends.setdefault(update.request_id, []).append(reason)
        return updates


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("way", ["cancel the task", "close the generator", "abort by id", "abort from a thread"])
def test_a_stream_that_is_given_up_ends_once_and_its_pages_come_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, steps_before: int, way: str
) -> None:
    """With 8 requests for 4 slots: the first is prefilled and decodes, the last waits on the host."""
    gate = Gate(engine, monkeypatch)
    names, given_up = [str(index) for index in range(8)], ("0", "3", "7")

    async def consume(asynchronous: AsyncEngine, name: str, finish: asyncio.Event, told: list[Update]) -> None:
        stream = asynchronous.stream([int(name) + 1] * 30, LONG, id=name)
        async with contextlib.aclosing(stream):
            async for update in stream:
                told.append(update)
                if finish.is_set():
                    return

    async def main() -> None:
        async with AsyncEngine(engine, steps_per_call=1) as asynchronous:
            told: dict[str, list[Update]] = {name: [] for name in names}
            finish = {name: asyncio.Event() for name in names}
            tasks = {}
            for name in names:
                tasks[name] = asyncio.create_task(consume(asynchronous, name, finish[name], told[name]))
                while name not in asynchronous._handles:
                    await asyncio.sleep(0.001)
            gate.let_through(steps_before)
            while gate.num_steps < steps_before:
                await asyncio.sleep(0.001)
            for name in given_up:
                if way == "cancel the task":
                    tasks[name].cancel()
                elif way == "close the generator":
                    finish[name].set()  # at its next update
                elif way == "abort by id":
                    asynchronous.abort(name)
                else:
                    await asyncio.to_thread(asynchronous.abort, name)
            if way == "cancel the task":
                await asyncio.wait([tasks[name] for name in given_up])
                assert all(tasks[name].cancelled() for name in given_up)
            gate.open.set()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            wait_until(lambda: not engine.has_work)
            assert gate.ends == {name: ["abort" if name in given_up else "length"] for name in names}
            assert num_free_pages(engine) == CONFIG.num_pages
            for name in set(names) - {*given_up}:
                assert check_updates(told[name]).outputs[0].finish_reason == "length"
            if way.startswith("abort"):
                for name in given_up:
                    assert check_updates(told[name]).outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_aborting_what_has_finished_or_never_was_does_nothing(engine: Engine) -> None:
    with AsyncEngine(engine) as asynchronous:
        handle = asynchronous.submit([1], SHORT, id="done")
        before = handle.result(PATIENCE)
        handle.abort()
        asynchronous.abort("done")
        asynchronous.abort("no such request")
        assert handle.result() == before and asynchronous.submit([1], SHORT).result(PATIENCE).outputs == before.outputs


def test_cancelling_generate_aborts_all_of_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(engine, monkeypatch)

    async def main() -> None:
        async with AsyncEngine(engine, steps_per_call=1) as asynchronous:
            task = asyncio.create_task(asynchronous.generate(make_prompts(9), LONG))
            gate.let_through(3)
            while gate.num_steps < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
            gate.open.set()
            wait_until(lambda: not engine.has_work)
            assert list(gate.ends.values()) == [["abort"]] * 9 and gate.num_steps < 12

    asyncio.run(main())


def test_a_full_queue_refuses_tasks_and_threads_that_do_not_wait_and_keeps_those_that_do(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = engine.generate([[1]], SHORT)
    reconfigure(engine, monkeypatch, max_waiting=2)
    gate = Gate(engine, monkeypatch)

    async def main() -> None:
        async with AsyncEngine(engine) as asynchronous:
            first = [asynchronous.submit([1], SHORT) for _ in range(2)]
            with pytest.raises(QueueFullError, match="2 requests wait"):
                asynchronous.submit([1], SHORT)
            with pytest.raises(QueueFullError, match="2 requests wait"):
                await collect(asynchronous, [1], SHORT)
            waiting = [asyncio.create_task(collect(asynchronous, [1], SHORT, wait=True)) for _ in range(9)]
            waiting.append(asyncio.create_task(asynchronous.generate([[1]] * 9, SHORT)))
            given_up = [asyncio.create_task(collect(asynchronous, [1], SHORT, wait=True)) for _ in range(5)]
            threads = [
                asyncio.create_task(asyncio.to_thread(lambda: asynchronous.submit([1], SHORT, wait=True).result()))
                for _ in range(5)
            ]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in [*waiting, *threads])
            for task in given_up:
                task.cancel()
            gate.open.set()
            *streams, together = await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)
            results = [*map(check_updates, streams), *together, *await asyncio.gather(*threads)]
            results += [handle.result(PATIENCE) for handle in first]
            assert len(results) == 25 and all(same(result, expected) for result in results)

    asyncio.run(main())


def test_a_consumer_that_is_slow_delays_nobody_and_gets_what_it_missed_in_one_piece(engine: Engine) -> None:
    (expected,) = engine.generate([[1, 2]], LONG)
    with AsyncEngine(engine, steps_per_call=1) as asynchronous:
        slow = asynchronous.submit([1, 2], LONG)
        first = next(slow)
        assert asynchronous.submit([3], SHORT).result(PATIENCE)
        wait_until(lambda: slow.finished)
        updates = [first, *slow]
        assert same(check_updates(updates), expected) and len(updates) < 30
        assert list(slow) == [] and same(slow.result(), expected)


def test_samples_that_nobody_looked_at_are_merged_each_on_its_own_and_the_result_comes_last(engine: Engine) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    with AsyncEngine(engine, steps_per_call=1) as asynchronous:
        handle = asynchronous.submit([1, 2], params)
        handle.result(PATIENCE)
        updates = list(handle)
    assert sorted(update.index for update in updates) == [0, 1, 2]
    check_updates(updates)


def test_the_update_with_the_result_comes_last_whichever_sample_was_told_of_first() -> None:
    handle = RequestHandle("r", abort=lambda _: None)
    result = RequestOutput("r", None, (1,), ())
    for update in (Update("r", "a", (1,)), Update("r", "x", (3,), index=1), Update("r", "b", (2,), result)):
        handle.put(update)
    assert list(handle) == [Update("r", "x", (3,), index=1), Update("r", "ab", (1, 2), result)]


def test_a_result_that_takes_longer_than_the_patience_for_it_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    with AsyncEngine(engine) as asynchronous:
        handle = asynchronous.submit([1], SHORT, id="slow")
        with pytest.raises(TimeoutError, match=r"'slow' has not finished within 0\.01 s"):
            handle.result(timeout=0.01)
        gate.open.set()
        assert handle.result(PATIENCE).outputs[0].finish_reason == "length"


def test_closing_ends_everything_and_leaves_the_engine_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = engine.generate([[1, 2]], SHORT)
    reconfigure(engine, monkeypatch, max_waiting=3)
    gate = Gate(engine, monkeypatch)

    async def main() -> None:
        asynchronous = AsyncEngine(engine, steps_per_call=1)
        handles = [asynchronous.submit([1, 2], LONG, wait=True)]
        gate.let_through(4)
        wait_until(lambda: gate.num_steps == 4)
        streams = [asyncio.create_task(collect(asynchronous, [1, 2], LONG)) for _ in range(3)]
        while len(asynchronous._handles) < 4:
            await asyncio.sleep(0.001)
        for_room = asyncio.create_task(collect(asynchronous, [1, 2], LONG, wait=True))
        await asyncio.sleep(0.05)
        closing = [asyncio.create_task(asynchronous.aclose()) for _ in range(2)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.wait_for(asyncio.gather(*closing), PATIENCE)
        (partial,) = tokens_of(check_updates(list(handles[0])))
        assert 0 < len(partial) < 60 and handles[0].result().outputs[0].finish_reason == "abort"
        for stream in streams:
            assert check_updates(await stream).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineClosedError, match="closed: make another one"):
            await for_room
        with pytest.raises(EngineClosedError):
            asynchronous.submit([1], SHORT)
        with pytest.raises(EngineClosedError):
            await collect(asynchronous, [1], SHORT)
        asynchronous.close()
        assert not asynchronous._thread.is_alive() and num_free_pages(engine) == CONFIG.num_pages

    asyncio.run(main())
    assert same(engine.generate([[1, 2]], SHORT)[0], expected)
    with AsyncEngine(engine) as another:
        assert same(another.submit([1, 2], SHORT).result(PATIENCE), expected)


def test_a_call_that_fails_reaches_all_its_waiters_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = engine.generate([[1, 2]], SHORT)
    gate, read = Gate(engine, monkeypatch), engine.driver.read

    def failing(*_: object, **__: object) -> None:
        monkeypatch.setattr(engine.driver, "read", read)
        raise OSError("the device is on fire")

    async def main() -> None:
        async with AsyncEngine(engine, steps_per_call=1) as asynchronous:
            handles = [asynchronous.submit([1, 2], LONG) for _ in range(6)]
            streams = [asyncio.create_task(collect(asynchronous, [1, 2], LONG)) for _ in range(3)]
            together = asyncio.create_task(asynchronous.generate([[1, 2]] * 3, LONG))
            while len(asynchronous._handles) < 12:
                await asyncio.sleep(0.001)
            gate.let_through(4)
            wait_until(lambda: gate.num_steps == 4)
            monkeypatch.setattr(engine.driver, "read", failing)
            gate.open.set()
            for lost in (*streams, together):
                with pytest.raises(RequestFailedError, match="the device is on fire") as caught:
                    await asyncio.wait_for(lost, PATIENCE)
                assert isinstance(caught.value.__cause__, OSError)
            for handle in handles:
                for wait in (handle.result, lambda handle=handle: list(handle)):
                    with pytest.raises(RequestFailedError, match="the device is on fire"):
                        wait()
                assert handle.finished
            assert same(check_updates(await collect(asynchronous, [1, 2], SHORT)), expected)

    asyncio.run(main())


def test_an_engine_that_does_not_recover_is_closed_and_says_why(warm_engine: Engine) -> None:
    engine = warm_engine
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_: object) -> None:
            raise OSError("the device is gone")

        patch.setattr(engine._loop, "turn", broken)
        patch.setattr(engine._loop, "reset", broken)
        with AsyncEngine(engine) as asynchronous:
            handle = asynchronous.submit([1], SHORT)
            with pytest.raises(RequestFailedError, match="the device is gone"):
                handle.result(PATIENCE)
            asynchronous._thread.join(PATIENCE)
            with pytest.raises(EngineClosedError, match="ended with OSError: the device is gone") as caught:
                asynchronous.submit([1], SHORT)
            assert isinstance(caught.value.__cause__, OSError)
    engine._loop.reset()


def test_an_event_loop_that_is_closed_leaves_no_request_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(engine, monkeypatch)
    with AsyncEngine(engine, steps_per_call=1) as asynchronous:
        loop = asyncio.new_event_loop()
        stream = asynchronous.stream([1, 2], LONG, id="left")
        first = loop.create_task(anext(stream))
        gate.let_through(2)
        loop.run_until_complete(first)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gate.open.set()
        wait_until(lambda: not engine.has_work)
        assert gate.ends == {"left": ["abort"]} and gate.num_steps < 30
        with contextlib.suppress(StopIteration):
            stream.aclose().send(None)


def test_an_idle_engine_uses_no_processor_time(engine: Engine) -> None:
    with AsyncEngine(engine) as asynchronous:
        asynchronous.submit([1], SHORT).result(PATIENCE)
        wait_until(lambda: not engine.has_work)
        time.sleep(0.05)
        clock = time.pthread_getcpuclockid(asynchronous._thread.ident)
        before = time.clock_gettime(clock)
        time.sleep(0.5)
        assert time.clock_gettime(clock) - before < 0.002


def test_only_one_drives_an_engine(engine: Engine) -> None:
    with AsyncEngine(engine):
        for use in (lambda: engine.generate([[1]], SHORT), lambda: engine.add_request([1]), engine.step):
            with pytest.raises(RuntimeError, match="works for an AsyncEngine"):
                use()
        with pytest.raises(ValueError, match="the engine is at work"):
            AsyncEngine(engine)
    engine.add_request([1], SHORT)
    with pytest.raises(ValueError, match="the engine is at work"):
        AsyncEngine(engine)
    with pytest.raises(ValueError, match="max_steps=0 must lie in"):
        engine.step(0)
    while engine.has_work:
        engine.step()
    with pytest.raises(ValueError, match="max_steps=9 must lie in"):
        AsyncEngine(engine, steps_per_call=9)


def test_new_weights_may_be_set_while_requests_run(engine: Engine) -> None:
    old, new = small_model.make_params(0), small_model.make_params(1)
    with AsyncEngine(engine, steps_per_call=1) as asynchronous:
        handles = [asynchronous.submit(prompt, LONG) for prompt in make_prompts(9)]
        for params in (new, old) * 3:
            engine.set_params(params)
            time.sleep(0.01)
        assert all(len(tokens_of(handle.result(PATIENCE))[0]) == 60 for handle in handles)


# Totals, latencies, and what a token costs.


def test_device_calls_and_host_reads_are_counted_and_few_per_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: collections.Counter[str] = collections.Counter()

    def counting(name: str, function: Callable) -> Callable:
        def call(*args):
            counted[name] += 1
            return function(*args)

        return call

    engine.reset_stats()
    programs = engine.driver.programs
    counters = {name: counting(name, getattr(programs, name)) for name in ("update", "run_steps")}
    monkeypatch.setattr(engine.driver, "programs", dataclasses.replace(programs, **counters))
    monkeypatch.setattr(jax, "device_get", counting("device_get", jax.device_get))
    monkeypatch.setattr(jax, "block_until_ready", counting("block_until_ready", jax.block_until_ready))
    params = dataclasses.replace(LONG, max_tokens=40, stop="no such text")
    engine.generate([[index + 1] * 4 for index in range(4)], params)
    while engine.has_work:
        engine.step()
    stats = engine.stats
    assert stats.num_device_calls == counted["update"] + counted["run_steps"]
    assert stats.num_host_reads == counted["device_get"] == counted["run_steps"] and not counted["block_until_ready"]
    assert counted["update"] <= 2
    assert stats.num_generated_tokens == 160
    # 8 steps per call and 4 samples, prefill and the last, empty call included: 1 read for 20 tokens.
    assert stats.num_host_reads <= 8 and stats.num_device_calls <= 10


def test_latencies_and_load_are_those_of_the_requests(engine: Engine) -> None:
    engine.reset_stats()
    params = [dataclasses.replace(LONG, max_tokens=2 + index) for index in range(10)]
    params.append(SamplingParams(n=2, max_tokens=7, ignore_eos=True))
    for prompt, wanted in zip(make_prompts(11), params, strict=True):
        engine.add_request(prompt, wanted)
    outputs, loads = [], []
    while engine.has_work:
        outputs += [update.output for update in engine.step(2) if update.output is not None]
        loads.append((engine.stats.num_running, engine.stats.num_waiting, engine.stats.num_used_pages))
    latencies, metrics = engine.stats.latencies, [output.metrics for output in outputs]
    num_tokens = [len(tokens) for output in outputs for tokens in tokens_of(output)]
    assert latencies.queue.count == latencies.time_to_first_token.count == latencies.end_to_end.count == 11
    assert latencies.inter_token.count == sum(num_tokens) - 12
    first = sum(one.first_token_time - one.arrival_time for one in metrics)
    end_to_end = sum(one.finish_time - one.arrival_time for one in metrics)
    assert latencies.time_to_first_token.sum == pytest.approx(first, rel=0.2)
    assert latencies.end_to_end.sum == pytest.approx(end_to_end, rel=0.2)
    assert 0 < latencies.queue.sum < latencies.time_to_first_token.sum
    assert latencies.queue.quantile(0.1) < latencies.queue.quantile(0.9) <= latencies.end_to_end.quantile(0.99)
    assert loads[0][1] == 11 and max(running for running, _, _ in loads) == CONFIG.max_slots
    assert loads[-1] == (0, 0, 0) and max(pages for _, _, pages in loads) <= engine.stats.peak_pages
    engine.reset_stats()
    assert engine.stats.latencies.queue.count == engine.stats.num_host_reads == 0


def test_tokens_that_come_together_share_the_time_since_the_last_and_the_sum_is_exact(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reset_stats()
    times = []
    note_tokens = engine.reporter.note_tokens

    def noting(sequence, num_tokens: int, now: float) -> None:
        times.append(now)
        note_tokens(sequence, num_tokens, now)

    monkeypatch.setattr(engine.reporter, "note_tokens", noting)
    engine.generate([[1, 2]], LONG)
    latencies = engine.stats.latencies
    assert latencies.inter_token.count == 59
    assert latencies.inter_token.sum == pytest.approx(times[-1] - times[0])


def test_stats_are_a_record_that_does_not_change(engine: Engine) -> None:
    engine.reset_stats()
    with AsyncEngine(engine) as asynchronous:
        asynchronous.submit([1], SHORT).result(PATIENCE)
        before = asynchronous.stats()
        copy = before.snapshot()
        assert before.num_generated_tokens == 5 and before.latencies.end_to_end.count == 1
        asynchronous.submit([1], SHORT).result(PATIENCE)
        assert before == copy and asynchronous.stats().num_generated_tokens == 10
