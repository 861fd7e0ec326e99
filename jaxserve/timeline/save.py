"""Records the timeline of an engine and saves its picture.

with recording(engine, "timeline.html"):
    engine.generate(prompts)
"""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator

from jaxserve.engine import Engine
from jaxserve.timeline import html, png
from jaxserve.timeline.record import Timeline

_FORMATS = {".png": png.draw, ".html": html.draw}


@contextlib.contextmanager
def recording(engine: Engine, path: str | None) -> Iterator[Timeline | None]:
    """Records what the engine does inside the context, and saves the picture at its end.

    Args:
      engine: the engine to record; the context replaces its observer until the end.
      path: the file for the picture, see `save_timeline`; None: nothing is recorded.

    Raises:
      ValueError: if the picture cannot be saved there; as far as possible before anything is recorded.
    """
    if path is None:
        yield None
        return
    check_path(path)
    timeline, before = Timeline(engine.config), engine.observer
    engine.observer = timeline.observe
    try:
        yield timeline
    finally:
        engine.observer = before
        save_timeline(timeline, path)


def save_timeline(timeline: Timeline, path: str) -> None:
    """Draws the picture of a timeline into a file.

    Args:
      timeline: the record.
      path: a file that ends in .html (one file that needs no other; pointing at a bar shows what it is) or in .png (which needs
        matplotlib).

    Raises:
      ValueError: if the path has another ending, the file cannot be written, or matplotlib is not installed.
    """
    check_path(path)
    content = _FORMATS[pathlib.Path(path).suffix.lower()](timeline)
    try:
        pathlib.Path(path).write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write the timeline to {path!r}: {error.strerror}") from error


def check_path(path: str) -> None:
    """Checks that a timeline can be saved in a file, before there is one.

    Raises:
      ValueError: if it cannot.
    """
    file = pathlib.Path(path)
    if file.suffix.lower() not in _FORMATS:
        raise ValueError(f"the timeline {path!r} must be a file that ends in {' or '.join(_FORMATS)}")
    if not file.parent.is_dir():
        raise ValueError(f"the timeline {path!r} cannot be written: there is no directory {str(file.parent)!r}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"the timeline {path!r} cannot be written: choose a file that you may write")
    if file.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"the timeline {path!r} needs matplotlib, which is not installed: pip install matplotlib, or name it "
            f"{file.with_suffix('.html').name!r}, which needs nothing"
        )
