"""Records of the throughput benchmark, per round, per engine and per comparison, and its printed report."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lib.records import Record, rounded
from lib.roofline import Work
from lib.table import Table, factor, number, percent
from lib.workloads import Workload
from peers.rounds import Measured, same_tokens

OURS = "jaxserve"
_METHOD = (
    "every engine in a process of its own, loaded once; one untimed round each, then rounds in turns, in rotated order; "
    "seconds from the first request handed over to the last token in hand, all requests at once; greedy, fixed token counts; "
    "medians over rounds, ratios of two engines' rounds of the same index; time per token: (last - first) / (tokens - 1) per "
    "request, median over requests; jaxserve's steps share the time of their call evenly; roofline: sum over its steps, as "
    "they were, of max(FLOPs / matmul rate, bytes / read bandwidth)"
)
_MEGA = 1e6
_BUSY_SHARE = 0.03  # idle engines' share of a round's processor time from which on a line reports it


def about(peaks: Mapping[str, Any], workload: Mapping[str, Any], dtype: str, model: str) -> Record:
    """Returns the fields of every record of a run; device and versions come from the process that measured the peaks."""
    where = dict(peaks["provenance"]) | {"seed": workload["seed"], "method": _METHOD}
    return {"model": model, "dtype": dtype, "workload": dict(workload), **where}


def round_record(measured: Measured, workload: Workload) -> Record:
    """Returns the record of a timed round, without its steps."""
    spans, cpu = measured.seconds_per_token, measured.others_cpu_seconds
    return {
        "kind": "round",
        "contender": measured.name,
        "round": measured.index,
        "seconds": rounded(measured.seconds),
        "requests_per_s": rounded(len(workload) / measured.seconds),
        "total_tokens_per_s": rounded((workload.num_prompt_tokens + workload.num_output_tokens) / measured.seconds),
        "output_tokens_per_s": rounded(workload.num_output_tokens / measured.seconds),
        "ms_per_token": None if not spans else rounded(1e3 * statistics.median(spans)),
        "p90_ms_per_token": None if not spans else rounded(1e3 * float(np.quantile(spans, 0.9))),
        "others_cpu_share": None if cpu is None else rounded(cpu / measured.seconds),
        **{name: value for name, value in measured.more.items() if name not in ("flops", "bytes")},
    }


def summary_record(rounds: Sequence[Record], loaded: Mapping[str, Any], peak_bytes: int | None) -> Record:
    """Returns the medians over the rounds of one engine, and its answer to loading."""
    names = (
        "seconds",
        "requests_per_s",
        "total_tokens_per_s",
        "output_tokens_per_s",
        "ms_per_token",
        "p90_ms_per_token",
    )
    return {
        "kind": "summary",
        "contender": rounds[0]["contender"],
        "rounds": len(rounds),
        **{name: _median([record[name] for record in rounds]) for name in names},
        "others_cpu_share": max((r["others_cpu_share"] or 0 for r in rounds), default=None),
        "peak_bytes": peak_bytes,
        **loaded,
    }


def engine_record(
    rounds: Sequence[Record], measured: Sequence[Measured], workload: Workload, loaded: Mapping[str, Any], peaks: Record
) -> Record:
    """Returns the figures of jaxserve's steps in its round of median length, compared with the limits of the machine."""
    middle = sorted(measured, key=lambda one: one.seconds)[len(measured) // 2]
    more = middle.more
    work = Work(np.array(more["flops"]), np.array(more["bytes"]))
    rate, bandwidth = peaks["matmul"]["flops_per_s"], peaks["read"]["bytes_per_s"]
    floor = work.floor_seconds(rate, bandwidth)
    needed = loaded["weights_bytes"] + loaded["pool_bytes"]
    used = loaded["weights_bytes"] + loaded["pool_bytes"] * more["peak_pages"] / loaded["num_pages"]
    base, peak = loaded["base_bytes"], max(record["peak_bytes"] for record in rounds)
    names = ("num_steps", "num_computed_tokens", "mean_occupancy", "mean_rows", "num_preemptions", "peak_pages")
    return {
        "kind": "engine",
        "contender": OURS,
        **{name: more[name] for name in names},
        "max_slots": loaded["max_slots"],
        "num_pages": loaded["num_pages"],
        "share_of_pages": rounded(more["peak_pages"] / loaded["num_pages"]),
        "ms_per_step": rounded(1e3 * middle.seconds / more["num_steps"]),
        "flops_per_s": rounded(work.flops.sum() / middle.seconds),
        "bytes_per_s": rounded(work.num_bytes.sum() / middle.seconds),
        "share_of_matmul_rate": rounded(work.flops.sum() / middle.seconds / rate),
        "share_of_read_bandwidth": rounded(work.num_bytes.sum() / middle.seconds / bandwidth),
        "roofline_tokens_per_s": rounded(workload.num_output_tokens / floor),
        "share_of_roofline": rounded(floor / middle.seconds),
        "weights_bytes": loaded["weights_bytes"],
        "pool_bytes": loaded["pool_bytes"],
        "base_bytes": base,
        "load_peak_bytes": loaded["load_peak_bytes"],
        "peak_bytes": peak,
        "memory_over_weights_and_pool": None if base is None else rounded((peak - base) / needed - 1),
        "memory_over_weights_and_used_pages": None if base is None else rounded((peak - base) / used - 1),
        "peaks": {name: value for name, value in peaks.items() if name != "provenance"},
    }


def ratio_record(ours: Sequence[Measured], theirs: Sequence[Measured]) -> Record:
    """Compares jaxserve's rounds with another engine's rounds of the same index: ratios above 1 mean jaxserve is faster."""
    by_index = {one.index: one for one in ours}
    pairs = [(by_index[other.index], other) for other in theirs if other.index in by_index]
    spans = [
        statistics.median(other.seconds_per_token) / statistics.median(one.seconds_per_token)
        for one, other in pairs
        if one.seconds_per_token and other.seconds_per_token
    ]
    speeds = [other.seconds / one.seconds for one, other in pairs]
    return {
        "kind": "ratio",
        "contender": theirs[0].name,
        "pairs": len(pairs),
        "output_tokens_per_s": _median(speeds),
        "output_tokens_per_s_range": [rounded(min(speeds)), rounded(max(speeds))] if speeds else None,
        "ms_per_token": _median(spans),
        "same_tokens": rounded(same_tokens(ours[0].token_ids, theirs[0].token_ids)),
    }


def print_engine(summary: Record, engine: Record, workload: Workload) -> None:
    """Prints jaxserve's figures: the first three lines as vLLM's benchmark prints them, then steps, memory and roofline."""
    print(
        f"Throughput: {summary['requests_per_s']:.2f} requests/s, {summary['total_tokens_per_s']:.2f} total tokens/s, "
        f"{summary['output_tokens_per_s']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {workload.num_prompt_tokens}")
    print(f"Total num output tokens:  {workload.num_output_tokens}")
    token = summary["ms_per_token"]
    print(
        f"Steps: {engine['num_steps']}, {number(engine['ms_per_step'])} ms and {engine['mean_rows']:.1f} rows each; time per "
        f"output token, median: {'unknown' if token is None else f'{number(token)} ms'}"
    )
    print(
        f"Slots: {engine['mean_occupancy']:.0%} of {engine['max_slots']} in use on average; pages: at most "
        f"{engine['peak_pages']} of {engine['num_pages']}; preemptions: {engine['num_preemptions']}"
    )
    over = engine["memory_over_weights_and_pool"]
    print(
        f"Memory: {_megabytes(engine['peak_bytes'])} at most while serving, {_megabytes(engine['load_peak_bytes'])} while "
        f"loading; weights {_megabytes(engine['weights_bytes'])}, pool {_megabytes(engine['pool_bytes'])}, before them "
        f"{_megabytes(engine['base_bytes'])}"
        + ("" if over is None else f": {over:+.0%} over weights and pool, ")
        + ("" if over is None else f"{engine['memory_over_weights_and_used_pages']:+.0%} over weights and pages in use")
    )
    product, read = engine["peaks"]["matmul"], engine["peaks"]["read"]
    print(
        f"Machine: products {product['flops_per_s'] / 1e9:.0f} GFLOP/s ({product['way']}), of which this run did "
        f"{engine['share_of_matmul_rate']:.1%}; reads {read['bytes_per_s'] / 1e9:.1f} GB/s ({read['way']}), of which "
        f"{engine['share_of_read_bandwidth']:.1%}"
    )
    print(
        f"Roofline: {number(engine['roofline_tokens_per_s'])} output tokens/s for these steps; this run is at "
        f"{engine['share_of_roofline']:.1%} of it",
        flush=True,
    )


_COLUMNS = {
    "engine": 16,
    "output tokens/s": 15,
    "requests/s": 10,
    "ms/token": 8,
    "peak MB": 8,
    "jaxserve is": 11,
    "per token": 9,
    "same tokens": 11,
    "versions": 8,
}


def print_comparison(summaries: Sequence[Record], ratios: Sequence[Record]) -> None:
    """Prints a row per engine; the columns "jaxserve is" and "per token" are factors by which jaxserve is faster."""
    table = Table(_COLUMNS)
    by_name = {ratio["contender"]: ratio for ratio in ratios}
    for summary in summaries:
        ratio = by_name.get(summary["contender"], {})
        peak = summary["peak_bytes"]
        table.print_row(
            {
                "engine": summary["contender"],
                "output tokens/s": f"{summary['output_tokens_per_s']:.1f}",
                "requests/s": f"{summary['requests_per_s']:.2f}",
                "ms/token": summary["ms_per_token"],
                "peak MB": None if peak is None else f"{peak / _MEGA:.0f}",
                "jaxserve is": factor(ratio.get("output_tokens_per_s")),
                "per token": factor(ratio.get("ms_per_token")),
                "same tokens": percent(ratio.get("same_tokens")),
                "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
            }
        )
    busy = [summary["contender"] for summary in summaries if (summary["others_cpu_share"] or 0) > _BUSY_SHARE]
    if busy:
        print(
            f"while {', '.join(busy)} ran, engines that should have been idle took more than {_BUSY_SHARE:.0%} of a core"
        )


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return rounded(statistics.median(numbers)) if numbers else None


def _megabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / _MEGA:.0f} MB"
