"""The AsyncEngine when it is closed, when a call or an event loop fails, and when another caller uses the engine."""

import asyncio
import contextlib
import threading
import time

import pytest

from jaxserve import (
    AsyncEngine,
    Engine,
    EngineClosedError,
    RequestFailedError,
)
from tests import small_model
from tests.engine.serving import (
    CONFIG,
    LONG,
    PATIENCE,
    SHORT,
    Gate,
    check_updates,
    collect,
    make_prompts,
    num_free_pages,
    reconfigure,
    same,
    tokens_of,
    wait_until,
)


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


def test_a_thread_that_does_not_start_leaves_the_engine_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            AsyncEngine(engine)
    assert len(engine.generate([[1, 2]], SHORT)) == 1
