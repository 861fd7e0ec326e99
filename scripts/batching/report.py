"""Tables, verdict and plot of `benchmark_static_vs_continuous.py`."""

import pathlib
from typing import Any

from lib.records import Record
from lib.table import Table, factor, percent

LITERATURE = (2, 24)  # range of the speed-ups over static batches that papers claim
_COLUMNS: dict[str, dict[str, int]] = {  # heading: width
    "batching": {
        "outputs": 11,
        "mean": 6,
        "longest": 7,
        "contender": 20,
        "tokens/s": 9,
        "speed-up": 8,
        "steps": 7,
        "fewer by": 8,
        "occupancy": 9,
        "wasted": 8,
        "queue s": 8,
        "p99": 8,
        "queue steps": 11,
        "padded rows": 11,
    },
    "memory": {
        "outputs": 11,
        "contender": 20,
        "slots": 5,
        "tokens/s": 9,
        "speed-up": 8,
        "fewer by": 8,
        "in flight": 9,
        "peak": 5,
        "live of pool": 12,
        "live of held": 12,
        "queue s": 8,
        "preempted": 9,
    },
}
_EXPLANATIONS = {
    "batching": """\
one engine with room for all slots. mean, longest: tokens per output; speed-up: tokens/s over static batches; fewer by: steps
of static batches over its own; wasted: slot-steps without a sequence; queue: seconds or steps until a request has a slot;
padded rows: rows of an engine of fixed shapes, which pads prompts and outputs of a batch to its longest, over those needed""",
    "memory": """\
the same pool for all three. speed-up: over static batches on reserved memory; in flight, peak: sequences with a slot while any
request waits; live: bytes with keys and values of tokens, as a share of the pool, and of what is reserved or in pages""",
}
_QUESTIONS = (
    ("continuous batching (continuous over static batches, all slots)", "continuous", "static"),
    ("paging (paged over reserved, the same bytes, both continuous)", "continuous, paged", "continuous, reserved"),
    ("both (paged and continuous over reserved and static, the same bytes)", "continuous, paged", "static, reserved"),
)


def print_about(common: Record, num_requests: int, longest: int) -> None:
    """Prints the facts that all tables share."""
    print(
        f"{common['model']} in {common['dtype']} on {common['device']}, jax {common['jax']}: {num_requests} requests, all "
        f"there from the beginning, the longest sequence {longest} tokens",
        flush=True,
    )


def start_table(part: str) -> Table:
    """Prints the meanings of a part's columns, and their headings."""
    print(f"\n{part}: {_EXPLANATIONS[part]}")
    return Table(_COLUMNS[part])


def print_rows(table: Table, records: list[Record]) -> None:
    """Prints a row for each contender; the others are compared with the first."""
    base = records[0]["contender"]
    for record in records:
        over = record["over"].get(base, {"speed_up": 1.0, "steps_ratio": 1.0})
        table.print_row(
            {
                "outputs": record["distribution"],
                "mean": f"{record['mean_output']:.1f}",
                "longest": record["longest_output"],
                "contender": record["contender"],
                "slots": record["slots"],
                "tokens/s": record["tokens_per_s"],
                "speed-up": factor(over["speed_up"]),
                "steps": record["steps"],
                "fewer by": factor(over["steps_ratio"]),
                "occupancy": percent(record["mean_occupancy"]),
                "wasted": record["wasted_slot_steps"],
                "queue s": f"{record['queue_s_mean']:.2f}",
                "p99": f"{record['queue_s_p99']:.2f}",
                "queue steps": f"{record['queue_steps_mean']:.1f}",
                "padded rows": factor(record["padded_rows_over_needed"]) if record["contender"] == "static" else None,
                "in flight": f"{record['in_flight_mean']:.1f}",
                "peak": record["in_flight_peak"],
                "live of pool": percent(record["live_share_of_pool"]),
                "live of held": percent(record["live_share_of_held"]),
                "preempted": record["preemptions"],
            }
        )
    if not all(record["tokens_equal"] for record in records):
        print(f"  {records[0]['distribution']}: static and continuous batching gave DIFFERENT tokens")


def verdict(records: list[Record]) -> list[str]:
    """Returns lines that say where the literature's claim holds: in tokens/s, with the ratio of steps beside it."""
    low, high = LITERATURE
    lines = [f"where the {low}x to {high}x of the literature hold, in tokens/s (in steps, which no noise touches):"]
    for question, contender, base in _QUESTIONS:
        gains = {record["distribution"]: record["over"][base] for record in records if record["contender"] == contender}
        if not gains:
            continue
        holds, fails = [], []
        for name, gain in gains.items():
            inside = low <= gain["speed_up"] <= high
            (holds if inside else fails).append(f"{name} {gain['speed_up']:.2f}x ({gain['steps_ratio']:.2f}x)")
        lines.append(f"  {question}:")
        lines.append(f"    holds: {', '.join(holds) or 'nowhere'}")
        lines.append(f"    does not hold: {', '.join(fails) or 'nowhere'}")
    lines.append(
        "  Those figures compare whole engines, with padded shapes, other kernels and host loops. Here engine and weights are"
    )
    lines.append(
        "  the same, a step costs less the fewer rows it has, and memory is reserved for the longest sequence that is served."
    )
    return lines


def print_verdict(records: list[Record]) -> None:
    """Prints `verdict`."""
    print("\n" + "\n".join(verdict(records)), flush=True)


def timeline_path(path: str, contender: str) -> str:
    """Returns the path of a contender's picture: its name goes before the ending."""
    file = pathlib.Path(path)
    return str(file.with_name(f"{file.stem}-{contender.replace(', ', '-')}{file.suffix}"))


def plot(records: list[Record], path: str) -> None:
    """Draws speed-up, occupancy, sequences in flight and live bytes by distribution into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in _COLUMNS if any(record["part"] == part for record in records)]
    figure = Figure(figsize=(12, 3.6 * len(parts)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(parts), 2, squeeze=False)
    for axes_of_part, part in zip(grid, parts, strict=True):
        own = [record for record in records if record["part"] == part]
        for axes, (title, series) in zip(axes_of_part, panels(part, own), strict=True):
            _bars(axes, title, list(dict.fromkeys(record["distribution"] for record in own)), series)
    figure.savefig(path)


def panels(part: str, records: list[Record]) -> list[tuple[str, dict[str, list[float]]]]:
    """Returns the panels of a part: a title, and by label one number per distribution."""
    by_contender: dict[str, list[Record]] = {}
    for record in records:
        by_contender.setdefault(record["contender"], []).append(record)

    def each(measure: str) -> dict[str, list[float]]:
        return {name: [record[measure] for record in own] for name, own in by_contender.items()}

    if part == "memory":
        return [
            ("sequences in flight, mean", each("in_flight_mean")),
            ("share of the pool with live tokens", each("live_share_of_pool")),
        ]
    gains = [record["over"]["static"] for record in by_contender["continuous"]]
    ratios = {"in tokens/s": "speed_up", "in steps": "steps_ratio"}
    return [
        ("continuous over static batches", {name: [gain[key] for gain in gains] for name, key in ratios.items()}),
        ("share of slots in use", each("mean_occupancy")),
    ]


def _bars(axes: Any, title: str, names: list[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
        axes.bar_label(axes.bar(places, values, width, label=label), fmt="%.2g", fontsize=7)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(y=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(series))
