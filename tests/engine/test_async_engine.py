"""The AsyncEngine: requests from tasks of an event loop and from threads."""

import asyncio
import contextlib
import threading

import pytest

from jaxserve import (
    AsyncEngine,
    Engine,
    QueueFullError,
    RequestHandle,
    RequestOutput,
    SamplingParams,
    Update,
)
from jaxserve.core.compile_guard import forbid_compilation
from tests.engine.serving import (
    CONFIG,
    LONG,
    PATIENCE,
    SHORT,
    Gate,
    all_kinds_of_params,
    check_updates,
    collect,
    make_prompts,
    num_free_pages,
    reconfigure,
    same,
    wait_until,
)


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


def test_a_slow_consumer_delays_no_other_and_gets_what_it_missed_in_one_piece(engine: Engine) -> None:
    (expected,) = engine.generate([[1, 2]], LONG)
    with AsyncEngine(engine, steps_per_call=1) as asynchronous:
        slow = asynchronous.submit([1, 2], LONG)
        first = next(slow)
        assert asynchronous.submit([3], SHORT).result(PATIENCE)
        wait_until(lambda: slow.finished)
        updates = [first, *slow]
        assert same(check_updates(updates), expected) and len(updates) < 30
        assert list(slow) == [] and same(slow.result(), expected)


def test_updates_that_are_not_taken_are_merged_per_sample_and_the_result_comes_last(engine: Engine) -> None:
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
