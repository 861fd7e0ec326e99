"""Draws a timeline as a page of HTML: one file with the picture inside, and no script."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxserve.timeline.legend import COLOURS, MEANINGS, PAGES_COLOUR, WAITING_COLOUR, short_meaning
from jaxserve.timeline.record import Bar, Phase, Timeline

_WIDTH = 1100  # px; more if there are more steps, because a step is at least 1 px wide
_LEFT = 64
_PANEL_HEIGHT, _PANEL_SPACE = 64, 26
_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 16px; color: #222; background: #fff; }
h1 { font-size: 18px; margin: 0 0 4px; }
.picture { display: flex; }
.steps { overflow-x: auto; }
text { font: 11px sans-serif; fill: #444; }
.name { fill: #10293d; pointer-events: none; }
rect[data-bar]:hover { stroke: #000; }
.legend span { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 14px; vertical-align: -1px; }
"""


def draw(timeline: Timeline) -> bytes:
    """Returns the content of the file."""
    return _page(timeline).encode("utf-8")


def _page(timeline: Timeline) -> str:
    steps = timeline.steps()
    unit = min(max(_WIDTH / max(len(steps), 1), 1.0), 24.0)  # px per step
    row = min(max(560 // timeline.num_slots, 4), 20)  # px per slot
    top = row * timeline.num_slots
    waiting, without = steps.num_waiting, timeline.num_without_slot(steps)
    panels: list[tuple[str, int, list[tuple[Any, str, str]]]] = [
        ("pages", timeline.num_pages, [(timeline.num_pages - steps.num_free_pages, PAGES_COLOUR, "pages in use")]),
        (
            "queue",
            int(np.max(waiting, initial=0)),
            [
                (waiting, WAITING_COLOUR, "samples without a slot"),
                (without, COLOURS[Phase.RECOMPUTE][0], "of them preempted"),
            ],
        ),
    ]
    height = top + len(panels) * (_PANEL_HEIGHT + _PANEL_SPACE) + 40
    width = unit * len(steps) + 30
    left = [_text(_LEFT - 6, y + row * 0.5 + 4, str(slot), "end") for slot, y in _slot_labels(timeline.num_slots, row)]
    left.append(_text(0, 12, "slot"))
    right = [*_bars(timeline, unit, row), *_axis(len(steps), unit, top)]
    for number, (name, highest, series) in enumerate(panels):
        y = top + 30 + number * (_PANEL_HEIGHT + _PANEL_SPACE) + _PANEL_SPACE - 14
        left += [_text(_LEFT - 6, y + 9, str(highest), "end"), _text(_LEFT - 6, y + _PANEL_HEIGHT, "0", "end")]
        left.append(_text(0, y + _PANEL_HEIGHT / 2, name))
        right.append(f'<rect x="0" y="{y}" width="{width - 30:.2f}" height="{_PANEL_HEIGHT}" fill="#f3f3f3"/>')
        for values, colour, meaning in series:
            right += _area(values, max(highest, 1), y, unit, colour, meaning)
    legend = "".join(
        f'<span style="background:{COLOURS[phase][1]}"></span>{html.escape(text)}' for phase, text in MEANINGS.items()
    )
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Timeline</title>',
            f"<style>{_STYLE}</style></head><body><h1>Timeline</h1>",
            f"<p>{html.escape(timeline.summary())}. Slots go from top to bottom, steps from left to right; "
            "point at a bar to see what it is.</p>",
            f'<p class="legend">{legend}</p><div class="picture">',
            f'<svg width="{_LEFT}" height="{height}" style="flex:none">{"".join(left)}</svg>',
            f'<div class="steps"><svg width="{width:.2f}" height="{height}">',
            *right,
            "</svg></div></div></body></html>\n",
        ]
    )


def describe(timeline: Timeline, bar: Bar) -> str:
    """Returns the text that is shown when the user points at a bar."""
    sequence = timeline.occupants[bar.occupant]
    tokens = {
        Phase.DECODE: f", {bar.num_tokens} tokens sampled",
        Phase.PREFILL: f", {bar.num_tokens} tokens computed",
        Phase.RECOMPUTE: f", {bar.num_tokens} tokens computed",
    }.get(bar.phase, "")
    end = f"; ended with {sequence.finish_reason!r}" if sequence.finish_reason else ""
    return (
        f"{sequence.name} (prompt of {sequence.prompt_length} tokens{end}), slot {bar.slot}, "
        f"{_span(bar.start, bar.stop)}: {short_meaning(bar.phase)}{tokens}"
    )


def tick_spacing(num_steps: int, unit: float) -> int:
    """Returns the number of steps between ticks: 1, 2 or 5 times a power of ten, so that they are at least 80 px apart."""
    return next(
        factor * 10**power for power in range(12) for factor in (1, 2, 5) if factor * 10**power * unit >= 80
    ) or max(num_steps, 1)


def _span(start: int, stop: int) -> str:
    return f"step {start}" if stop == start + 1 else f"steps {start} to {stop - 1}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _slot_labels(num_slots: int, row: int) -> Iterator[tuple[int, int]]:
    """Yields the slots that get a number and its position: as many as there is room for."""
    every = max(-(-14 // row), 1)
    return ((slot, slot * row) for slot in range(0, num_slots, every))


def _bars(timeline: Timeline, unit: float, row: int) -> Iterator[str]:
    space = 1 if row >= 6 else 0
    for bar in timeline.bars():
        x, width = bar.start * unit, (bar.stop - bar.start) * unit
        title = html.escape(describe(timeline, bar))
        yield (
            f'<rect data-bar="" x="{x:.2f}" y="{bar.slot * row}" width="{width:.2f}" height="{row - space}" '
            f'fill="{COLOURS[bar.phase][bar.odd]}"><title>{title}</title></rect>'
        )
        name = timeline.occupants[bar.occupant].name
        if bar.phase == Phase.DECODE and row >= 14 and width >= 7 * len(name) + 6:
            yield f'<text class="name" x="{x + 3:.2f}" y="{bar.slot * row + row * 0.5 + 4:.2f}">{html.escape(name)}</text>'


def _axis(num_steps: int, unit: float, top: int) -> Iterator[str]:
    for step in range(0, num_steps + 1, tick_spacing(num_steps, unit)):
        x = step * unit
        yield f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top}" y2="{top + 5}" stroke="#444"/>'
        yield _text(x, top + 17, f"step {step}" if step == 0 else str(step), "start" if step == 0 else "middle")


def _area(
    values: Int[np.ndarray, " n"], highest: int, top: float, unit: float, colour: str, meaning: str
) -> Iterator[str]:
    """Yields a rectangle for each run of equal values."""
    numbers: Sequence[int] = values.tolist()
    start = 0
    for stop in range(1, len(numbers) + 1):
        if stop < len(numbers) and numbers[stop] == numbers[start]:
            continue
        if numbers[start]:
            height = _PANEL_HEIGHT * numbers[start] / highest
            yield (
                f'<rect x="{start * unit:.2f}" y="{top + _PANEL_HEIGHT - height:.2f}" width="{(stop - start) * unit:.2f}" '
                f'height="{height:.2f}" fill="{colour}"><title>{_span(start, stop)}: {numbers[start]} {meaning}</title></rect>'
            )
        start = stop
