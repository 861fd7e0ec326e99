"""Plots of benchmarks: panels of lines. matplotlib is imported only when a plot is drawn."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      label: text in the legend.
      x, y: coordinates of the points.
      dashed: True for curves that are not measurements, such as a fit or a limit.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
      title: heading of the panel.
      x_label, y_label: quantities of the axes, with units.
      lines: the curves.
      log_x, log_y: True for a logarithmic axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


def check_plot(path: str | None) -> None:
    """Checks that a plot can be saved to this path, before anything is measured.

    Raises:
      ValueError: if the plot cannot be saved there.
    """
    if path is None:
        return
    file = pathlib.Path(path)
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot={path} must be a file that ends in .png, .svg or .pdf")
    if not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"--plot={path} cannot be written: choose an existing directory that you may write to")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot={path} needs matplotlib, which is not installed: pip install matplotlib")


def save_plot(path: str | None, panels: Sequence[Panel], *, title: str) -> None:
    """Draws the panels side by side, four in a line; does nothing if `path` is None or there are no panels."""
    if path is None or not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for line in panel.lines:
            style = {"linestyle": "--", "linewidth": 1} if line.dashed else {"marker": "o", "markersize": 3}
            axes.plot(line.x, line.y, label=line.label, **style)
        positive = all(value > 0 for line in panel.lines for value in line.x)
        if panel.log_x:
            axes.set_xscale("log" if positive else "symlog")
        if panel.log_y:
            axes.set_yscale("log")
            axes.set_ylim(*_decade([value for line in panel.lines for value in line.y]))
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _decade(values: Sequence[float]) -> tuple[float, float]:
    """Returns limits with room for all values and at least a factor of ten between them, so that a flat curve looks flat."""
    low, high = min(values) / 1.3, max(values) * 1.3
    widen = max(10 / (high / low), 1) ** 0.5
    return low / widen, high * widen
