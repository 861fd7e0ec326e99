"""One small engine for all tests of a module that serve with it."""

import pathlib
from collections.abc import Iterator

import pytest

from jaxserve import Engine, Update
from jaxserve.core.compile_guard import forbid_compilation
from tests import small_model
from tests.engine.serving import CONFIG, num_free_pages


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")  # its programs are shared, but may be forgotten between modules
def warm_engine(checkpoint: pathlib.Path) -> Engine:
    engine = Engine.from_pretrained(str(checkpoint), dtype="float32", config=CONFIG)
    engine.warm_up()
    return engine


@pytest.fixture
def engine(warm_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Yields an engine. No thread may compile anything, and no request may be left afterwards."""
    step = warm_engine._step  # which `step`, `generate` and streams have in common

    def guarded(max_steps: int | None) -> list[Update]:
        with forbid_compilation():
            return step(max_steps)

    monkeypatch.setattr(warm_engine, "_step", guarded)
    yield warm_engine
    while warm_engine.has_work:
        warm_engine.step()
    assert num_free_pages(warm_engine) == CONFIG.num_pages and warm_engine._owner is None
