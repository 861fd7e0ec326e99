"""The record of the slots' steps and its pictures: on small cases made by hand, and against the totals of an engine."""

import importlib.util
import pathlib
import re
import struct
import types
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from jaxserve import Engine, EngineConfig, Request, SamplingParams
from jaxserve.core.scheduler import Status
from jaxserve.engine.live_requests import LiveRequest, LiveSample
from jaxserve.timeline import Bar, Phase, Timeline, check_path, html, png, recording
from jaxserve.timeline.legend import COLOURS
from tests import small_model
from tests.command_line import options_of, run_here

NONE = 6  # rows of the queue; in a slot: no row
PREFILL, RECOMPUTE, DECODE, STALLED, PREEMPTED = Phase


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model.make_params(), small_model.MODEL, EngineConfig(**small_model.CAPACITIES))


def sequences(*ids: str, prompt_length: int = 5, n: int = 1) -> list[LiveSample]:
    params = SamplingParams(n=n)
    prompt = tuple(range(prompt_length))
    groups = [LiveRequest(Request(id, prompt_token_ids=prompt), prompt, params, 0, None, ()) for id in ids]
    return [sample for group in groups for sample in group.samples]


def call(cells: list[str], status: dict[int, Status], free: list[int], preempted: dict[int, int] | None = None) -> Any:
    """A call's outputs. A string is a slot, step by step: `row:num_new`, with `!` if a token was drawn; `.`: not in use."""
    parts = [cell.split() for cell in cells]
    row_id = np.array([[NONE if part == "." else int(part.split(":")[0]) for part in slot] for slot in parts]).T
    num_new = np.array(
        [[0 if part == "." else int(part.strip("!").split(":")[1]) for part in slot] for slot in parts]
    ).T
    num_steps, stale = len(row_id), ((0, 3), (0, 0))
    return types.SimpleNamespace(
        steps=types.SimpleNamespace(
            row_id=np.pad(row_id, stale, constant_values=1).astype(np.int32),
            num_new=np.pad(num_new, stale, constant_values=9).astype(np.int32),
            sampled=np.pad(np.array([[part.endswith("!") for part in slot] for slot in parts]).T, stale),
            num_free_pages=np.array([*free, 0, 0, 0], np.int32),
            num_waiting=np.array([*[1] * num_steps, 7, 7, 7], np.int32),
            num_preempted=np.array([(preempted or {}).get(step, 0) for step in range(num_steps + 3)], np.int32),
        ),
        num_steps=np.int32(num_steps),
        status=np.array([status.get(row, Status.FREE) for row in range(NONE)], np.int32),
        generation=np.ones(NONE, np.int32),
    )


def empty(num_slots: int = 2, num_pages: int = 10) -> Timeline:
    return Timeline(EngineConfig(max_slots=num_slots, num_pages=num_pages, max_model_len=32, page_size=8))


def spans(bars: list[Bar]) -> list[tuple[int, int, int, int, Phase, int]]:
    return [(bar.slot, bar.start, bar.stop, bar.occupant, bar.phase, bar.num_tokens) for bar in bars]


def test_each_phase_is_a_bar_and_a_slot_goes_from_one_sequence_to_the_next() -> None:
    timeline = empty()
    a, b, c = sequences("a", "b", "c")
    first = ["0:4 0:2! 0:1! 0:1!", "1:0 1:6! 1:1! ."]
    timeline.observe(
        call(first, {0: Status.STOP, 1: Status.LENGTH, 2: Status.WAITING}, [5, 4, 3, 6]), {0: a, 1: b, 2: c}, 4
    )
    timeline.observe(call(["2:3!", "."], {2: Status.STOP}, [9]), {2: c}, 0)
    assert spans(timeline.bars()) == [
        (0, 0, 2, 0, PREFILL, 6),
        (0, 2, 4, 0, DECODE, 2),
        (0, 4, 5, 2, PREFILL, 3),
        (1, 0, 1, 1, STALLED, 0),
        (1, 1, 2, 1, PREFILL, 6),
        (1, 2, 3, 1, DECODE, 1),
    ]
    assert [bar.odd for bar in timeline.bars()] == [False, False, True, False, False, False]
    assert [(one.name, one.finish_reason) for one in timeline.occupants] == [
        ("a", "stop"),
        ("b", "length"),
        ("c", "stop"),
    ]
    steps = timeline.steps()
    assert steps.num_free_pages.tolist() == [5, 4, 3, 6, 9]
    assert steps.num_waiting.tolist() == [5, 5, 5, 5, 1]
    assert steps.mean_occupancy == 8 / 10
    assert timeline.summary() == (
        "3 requests, 5 steps, mean occupancy 80% of 2 slots, at most 7 of 10 pages in use, 0 preemptions"
    )


def test_a_preempted_sequence_is_drawn_where_it_was_until_another_takes_its_place_and_then_prefills_again() -> None:
    timeline = empty()
    a, b, c = sequences("a", "b", "c")
    rows = {0: a, 1: b, 2: c}
    running = {0: Status.RUNNING, 1: Status.WAITING, 2: Status.WAITING}
    timeline.observe(call(["0:5! 0:1! 0:1!", "1:5! . ."], running, [1, 1, 1], {1: 1}), rows, 0)
    timeline.observe(
        call(["0:1! 1:6! 1:1!", "2:5! 2:1! 2:1!"], {0: Status.STOP, 1: Status.STOP, 2: Status.STOP}, [0] * 3), rows, 0
    )
    assert spans(timeline.bars()) == [
        (0, 0, 1, 0, PREFILL, 5),
        (0, 1, 4, 0, DECODE, 3),
        (0, 4, 5, 1, RECOMPUTE, 6),
        (0, 5, 6, 1, DECODE, 1),
        (1, 0, 1, 1, PREFILL, 5),
        (1, 1, 3, 1, PREEMPTED, 0),
        (1, 3, 4, 2, PREFILL, 5),
        (1, 4, 6, 2, DECODE, 2),
    ]
    assert timeline.num_without_slot(timeline.steps()).tolist() == [0, 1, 1, 1, 0, 0]
    assert timeline.summary().endswith("1 preemptions")


def test_what_is_preempted_stays_so_until_it_is_aborted_or_the_record_ends() -> None:
    timeline = empty()
    a, b = sequences("a", "b")
    waiting = {0: Status.WAITING, 1: Status.WAITING}
    timeline.observe(call(["0:5! .", "1:5! ."], waiting, [1, 1], {1: 2}), {0: a, 1: b}, 0)
    timeline.observe(call([". .", ". ."], {0: Status.ABORT, 1: Status.WAITING}, [1, 1]), {0: a, 1: b}, 0)
    ends = [(bar.occupant, bar.start, bar.stop) for bar in timeline.bars() if bar.phase == PREEMPTED]
    assert ends == [(0, 1, 2), (1, 1, 4)]


def test_one_that_is_aborted_while_it_runs_was_not_preempted() -> None:
    timeline = empty()
    a, b = sequences("a", "b")
    timeline.observe(call(["0:5!", "1:5!"], {0: Status.RUNNING, 1: Status.RUNNING}, [1]), {0: a, 1: b}, 0)
    timeline.observe(call([". .", "1:1! 1:1!"], {0: Status.ABORT, 1: Status.RUNNING}, [1, 1]), {0: a, 1: b}, 0)
    assert [bar.phase for bar in timeline.bars()] == [PREFILL, PREFILL, DECODE]
    assert timeline.occupants[0].finish_reason == "abort"


def test_a_row_that_is_used_again_is_another_sequence_and_samples_have_their_index() -> None:
    timeline = empty()
    first, second = sequences("a", n=2)
    (other,) = sequences("b")
    timeline.observe(call(["0:5!", "1:1!"], {0: Status.STOP, 1: Status.STOP}, [1]), {0: first, 1: second}, 0)
    again = call(["0:5!", "."], {0: Status.STOP}, [1])
    again.generation[0] = 2
    timeline.observe(again, {0: other}, 0)
    assert [one.name for one in timeline.occupants] == ["a[0]", "a[1]", "b"]
    assert timeline.steps().occupant.tolist() == [[0, 1], [2, -1]]


def crowded(engine: Engine) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            f"<{index}> & co",
            prompt_token_ids=tuple(rng.integers(1, 300, rng.integers(2, 40)).tolist()),
            params=SamplingParams(temperature=0, max_tokens=int(rng.integers(1, 50)), ignore_eos=True),
        )
        for index in range(20)
    ]


def test_the_record_has_all_that_the_engine_counts(engine: Engine, tmp_path: pathlib.Path) -> None:
    requests = crowded(engine)
    engine.reset_stats()
    with recording(engine, str(tmp_path / "out.html")) as timeline:
        for _ in engine.serve(requests):
            pass
    assert engine.observer is None and timeline is not None
    stats, steps, bars = engine.stats, timeline.steps(), timeline.bars()
    assert stats.num_preemptions > 0
    assert len(steps) == stats.num_steps and steps.mean_occupancy == pytest.approx(stats.mean_occupancy)
    assert timeline.num_pages - steps.num_free_pages.min() == stats.peak_pages
    assert len(timeline.gaps(steps)) == int(steps.num_preempted.sum()) == stats.num_preemptions
    assert sum(bar.stop - bar.start for bar in bars if bar.phase != PREEMPTED) == stats.num_slot_steps
    drawn = {one.request_id: 0 for one in timeline.occupants}
    for step, slot in np.argwhere(steps.sampled).tolist():
        drawn[timeline.occupants[steps.occupant[step, slot]].request_id] += 1
    assert drawn == {request.id: request.params.max_tokens for request in requests}
    assert all(one.finish_reason == "length" for one in timeline.occupants)
    computed = sum(bar.num_tokens for bar in bars if bar.phase != PREEMPTED)
    assert computed == stats.num_computed_tokens
    first = sum(bar.num_tokens for bar in bars if bar.phase == PREFILL)
    lost = {gap.occupant for gap in timeline.gaps(steps)}
    known = sum(one.prompt_length for index, one in enumerate(timeline.occupants) if index not in lost)
    assert known - len(requests) <= first <= stats.num_prompt_tokens  # of a chunk's end one token may count as decoding
    assert steps.num_waiting[0] == len(requests) - int(np.sum(steps.occupant[0] >= 0))
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert_page_has(page, bars, timeline)


def assert_page_has(page: str, bars: list[Bar], timeline: Timeline) -> None:
    """Checks that a page has every bar in its place, with its title, and loads nothing from elsewhere."""
    assert not re.search(r"<script|<link|<img|https?:|url\(|@import|\b(src|href|on\w+)=", page)
    _, picture = (ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    drawn = [rect for rect in picture.iter("rect") if "data-bar" in rect.attrib]
    assert len(drawn) == len(bars)
    unit = float(drawn[0].attrib["width"]) / (bars[0].stop - bars[0].start)
    for rect, bar in zip(drawn, bars, strict=True):
        assert float(rect.attrib["x"]) == pytest.approx(bar.start * unit, abs=0.02 * bar.stop)
        assert float(rect.attrib["width"]) == pytest.approx((bar.stop - bar.start) * unit, abs=0.02 * bar.stop)
        assert rect.find("title").text == html.describe(timeline, bar)  # type: ignore[union-attr]
        assert rect.attrib["fill"] in COLOURS[bar.phase]
    assert html.describe(timeline, bars[0]).startswith("<0> & co (prompt of ")


def test_without_steps_there_is_an_empty_picture() -> None:
    timeline = empty()
    assert timeline.bars() == [] and "0 requests, 0 steps" in html.draw(timeline).decode()
    assert png.draw(timeline).startswith(b"\x89PNG")


def long_record(num_steps: int, num_slots: int) -> Timeline:
    """Returns a timeline in which every sequence decodes for ten steps."""
    timeline = empty(num_slots)
    rows = sequences(*map(str, range(NONE)))
    for start in range(0, num_steps, 10):
        slots = [" ".join([f"{start // 10 % NONE}:1!"] * 10)] + [" ".join("." * 10)] * (num_slots - 1)
        outputs = call(slots, {start // 10 % NONE: Status.STOP}, [1] * 10)
        outputs.generation[:] = start
        timeline.observe(outputs, dict(enumerate(rows)), 0)
    return timeline


def test_thousands_of_steps_and_hundreds_of_slots_keep_a_pixel_each() -> None:
    timeline = long_record(4000, 256)
    assert [bar.stop - bar.start for bar in timeline.bars()] == [10] * 400
    picture = png.draw(timeline)
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 4000 and height >= 256
    page = html.draw(timeline).decode()
    widths = {float(width) for width in re.findall(r'data-bar="" x="[\d.]+" y="0" width="([\d.]+)"', page)}
    assert widths == {10.0} and f'height="{4 * 256 + 220}"' in page


def test_a_picture_in_which_steps_share_pixels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    monkeypatch.setattr(axes, "set_title", lambda self, title, **_: titles.append(title))
    timeline = long_record(2000, 2)
    png.draw(timeline)
    monkeypatch.setattr(png, "_MAX_WIDTH_PX", 1000)
    png.draw(timeline)
    assert "share a pixel" not in titles[0] and "2.0 steps share a pixel: save it as .html" in titles[1]


@pytest.mark.parametrize(("num_steps", "unit", "spacing"), [(10, 24.0, 5), (1100, 1.0, 100), (4000, 1.0, 100)])
def test_ticks_stand_apart(num_steps: int, unit: float, spacing: int) -> None:
    assert html.tick_spacing(num_steps, unit) == spacing


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out.jpg", "must be a file that ends in .png or .html"),
        ("/nonexistent/out.html", "there is no directory '/nonexistent'"),
        (".html", "must be a file that ends in"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_before_anything_is_done(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_path(path)
    with pytest.raises(ValueError, match=re.escape(message)):
        options_of("--prompt=x", f"--timeline={path}")


def test_a_picture_without_matplotlib_is_refused_with_two_ways_out(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib, or name it 'out.html'"):
        check_path(str(tmp_path / "out.png"))
    check_path(str(tmp_path / "out.html"))


def test_a_directory_in_the_way_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out.html").mkdir()
    with pytest.raises(ValueError, match="choose a file"):
        check_path(str(tmp_path / "out.html"))


@pytest.mark.parametrize("ending", ["png", "html"])
def test_the_command_line_draws_what_it_served(
    engine: Engine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    path = tmp_path / f"out.{ending}"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2, 3]}\n' * 6)
    arguments = ["--max_tokens=5", "--ignore_eos", "--nodetokenize", f"--timeline={path}", f"--prompts_file={prompts}"]
    assert run_here(engine, *arguments, f"--output={tmp_path / 'out.jsonl'}") == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<!DOCTYPE html>")
    if ending == "html":
        assert b"6 requests, " in content and b"prompts.jsonl" not in content and b"line-6" in content
    assert engine.observer is None
