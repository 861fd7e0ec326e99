"""Draws a timeline as a PNG file with matplotlib, which is imported only when a picture is drawn."""

import io
from typing import Any

import numpy as np

from jaxserve.timeline.legend import COLOURS, PAGES_COLOUR, WAITING_COLOUR, short_meaning
from jaxserve.timeline.record import Bar, Phase, Timeline

_DPI = 100
_MARGIN_PX = 160
_MAX_WIDTH_PX = 30_000  # matplotlib can draw 65,535


def draw(timeline: Timeline) -> bytes:
    """Returns the content of the file.

    A step is at least one pixel wide. If that makes the picture too wide, several steps share a pixel and the title says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_steps = len(timeline.steps())
    width = min(max(num_steps, 900), _MAX_WIDTH_PX)
    slots_inches = min(max(0.18 * timeline.num_slots, 1.2), 10.0)
    figure = Figure(figsize=((width + _MARGIN_PX) / _DPI, slots_inches + 3.2), dpi=_DPI)
    FigureCanvasAgg(figure)
    left, right = 80 / (width + _MARGIN_PX), (80 + width) / (width + _MARGIN_PX)
    slots, pages, queue = figure.subplots(
        3,
        1,
        sharex=True,
        gridspec_kw={
            "height_ratios": [slots_inches, 0.8, 0.8],
            "left": left,
            "right": right,
            "top": 1 - 0.75 / (slots_inches + 3.2),
        },
    )
    _draw_slots(slots, timeline)
    _draw_panels(pages, queue, timeline)
    slots.set_xlim(0, max(num_steps, 1))
    title = timeline.summary()
    if num_steps > width:
        title += f"\n{num_steps / width:.1f} steps share a pixel: save it as .html to see each"
    slots.set_title(title, loc="left", fontsize=9, pad=34)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _draw_slots(axes: Any, timeline: Timeline) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    bars = timeline.bars()
    height = 0.86 if timeline.num_slots <= 64 else 1.0
    corners = [
        [(bar.start, y), (bar.stop, y), (bar.stop, y + height), (bar.start, y + height)]
        for bar in bars
        for y in [bar.slot - height / 2]
    ]
    colours = [COLOURS[bar.phase][bar.odd] for bar in bars]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none", antialiased=False))
    axes.set_ylim(timeline.num_slots - 0.5, -0.5)
    axes.set_ylabel("slot")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _write_names(axes, timeline, bars)
    present = {bar.phase for bar in bars}
    handles = [Patch(color=COLOURS[phase][1], label=short_meaning(phase)) for phase in Phase if phase in present]
    if handles:
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), fontsize=8, frameon=False
        )


def _write_names(axes: Any, timeline: Timeline, bars: list[Bar]) -> None:
    """Writes the names of requests into the bars that have room for them."""
    if timeline.num_slots > 64:
        return
    step_px = axes.get_window_extent().width / max(len(timeline.steps()), 1)
    for bar in bars:
        name = timeline.occupants[bar.occupant].name
        if bar.phase == Phase.DECODE and (bar.stop - bar.start) * step_px >= 6 * len(name) + 6:
            axes.text(
                bar.start + 4 / step_px, bar.slot, name, fontsize=7, color="#10293d", va="center", parse_math=False
            )


def _draw_panels(pages: Any, queue: Any, timeline: Timeline) -> None:
    steps = timeline.steps()
    edges = np.arange(len(steps) + 1)
    pages.stairs(timeline.num_pages - steps.num_free_pages, edges, fill=True, color=PAGES_COLOUR)
    pages.axhline(timeline.num_pages, color="#888", linewidth=0.8, linestyle="--")
    pages.set_ylim(0, 1.08 * max(timeline.num_pages, 1))
    pages.set_ylabel("pages")
    without = timeline.num_without_slot(steps)
    queue.stairs(steps.num_waiting, edges, fill=True, color=WAITING_COLOUR, label="samples without a slot")
    if without.any():
        queue.stairs(without, edges, fill=True, color=COLOURS[Phase.RECOMPUTE][0], label="of them preempted")
        queue.legend(loc="upper right", fontsize=8, frameon=False)
    queue.set_ylim(0, 1.08 * max(int(np.max(steps.num_waiting, initial=0)), 1))
    queue.set_ylabel("queue")
    queue.set_xlabel("step")
