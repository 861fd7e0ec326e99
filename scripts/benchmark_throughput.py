"""Measures offline throughput: how fast an engine serves a workload, and how near that is to the limit of the machine.

    python scripts/benchmark_throughput.py
    python scripts/benchmark_throughput.py --model configs/models/llama-135m.json --json out.jsonl
    python scripts/benchmark_throughput.py --model configs/models/llama-135m.json \\
        --compare transformers,transformers_cb,vllm,llama_cpp --vllm_python ~/vllm/bin/python --llama_cpp_server llama-server

Without flags the demo model serves W48 (`lib/workloads.py`); `--model` takes a checkpoint, or a config.json for random weights.
`--compare` runs other engines in the same run and in turns, on the same weights, prompts and token counts. Each engine is a
process of its own, under an interpreter of its own if one is given; one that is not installed is named and left out.
`machine_peaks.py` measures the peaks of the machine, and `lib/roofline.py` counts the least work of the steps.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from lib import workloads
from lib.command import run_command
from lib.engine_options import BENCHMARK, EngineOptions, define_engine_flags, fitted_options, load_model, run_app
from lib.flag_values import names, options_from_flags
from lib.records import outputs
from lib.workloads import Workload
from peers import report
from peers.process import Peer, PeerError, PeerProcess, PeerUnavailable
from peers.report import OURS
from peers.rounds import Measured, measure

from jaxserve import DEMO_MODEL, ModelConfig
from jaxserve.commands.flags import define_timeline_flag
from jaxserve.timeline import check_path

PEERS = {  # name -> module and arguments of the driver
    "transformers": ("peers.transformers_driver", ("static",)),
    "transformers_cb": ("peers.transformers_driver", ("continuous",)),
    "vllm": ("peers.vllm_driver", ()),
    "llama_cpp": ("peers.llama_cpp_driver", ()),
}
_FLAGS_OF = {
    "transformers_python": ("transformers", "transformers_cb"),
    "vllm_python": ("vllm",),
    "llama_cpp_python": ("llama_cpp",),
    "llama_cpp_server": ("llama_cpp",),
}
_PYTHON_OF = {name: flag for flag, peers in _FLAGS_OF.items() if flag.endswith("_python") for name in peers}
_LOAD_SECONDS = 1800
_QUIET_LOAD = 0.5  # load average of the last minute below which a machine counts as quiet


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    workloads.define_flags(values)
    define_engine_flags(values)
    define_timeline_flag(values)
    to: dict[str, Any] = {"flag_values": values, "module_name": BENCHMARK}
    flags.DEFINE_list("compare", [], f"Engines to compare with, in turns: {', '.join(PEERS)}.", **to)
    flags.DEFINE_integer("repeats", 5, "Timed rounds of each engine.", lower_bound=1, **to)
    flags.DEFINE_string("json", None, "Write the records as JSON lines to this file.", **to)
    flags.DEFINE_integer("timeout_s", 3600, "Seconds that a round may take at most.", lower_bound=1, **to)
    for flag, peers in _FLAGS_OF.items():
        if flag.endswith("_python"):
            flags.DEFINE_string(
                flag, None, f"Python interpreter that has {' and '.join(peers)}; by default this one.", **to
            )
    flags.DEFINE_string("llama_cpp_server", "llama-server", "Path of llama.cpp's llama-server.", **to)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags, checked."""

    engine: EngineOptions
    model: ModelConfig
    workload: Workload
    workload_flags: dict[str, Any]
    compare: tuple[str, ...]
    pythons: dict[str, str]
    llama_cpp_server: str
    repeats: int
    timeout_s: int
    json: str | None
    timeline: str | None


def parse_options(values: flags.FlagValues) -> Options:
    """Reads the flags.

    Raises:
      ValueError: if a flag's value is not valid, or has no effect on what is measured.
    """
    compare = names("compare", values.compare, tuple(PEERS), all_allowed=False) if values.compare else ()
    for flag, peers in _FLAGS_OF.items():
        if values[flag].present and not set(peers) & set(compare):
            raise ValueError(f"--{flag} has no effect without --compare={peers[0]}: leave it out")
    if values.timeline is not None:
        check_path(values.timeline)
    model, tokenizer = load_model(fitted_options(values))
    workload = workloads.workload_from_flags(values, model.vocab_size, tokenizer)
    if workload.longest > model.max_position:
        raise ValueError(
            f"the longest sequence has {workload.longest} tokens, but the model was made for {model.max_position}: "
            "lower --longest_prompt or --longest_output"
        )
    engine = fitted_options(values, max_model_len=workload.longest)
    if engine.config.max_sequence_len < workload.longest:
        raise ValueError(
            f"max_model_len={engine.config.max_sequence_len} is shorter than the longest sequence, {workload.longest} "
            "tokens: raise it, or leave it out"
        )
    return options_from_flags(
        Options,
        values,
        engine=engine,
        model=model,
        workload=workload,
        workload_flags=workloads.describe_workload(values),
        compare=compare,
        pythons={name: values[flag].value or sys.executable for name, flag in _PYTHON_OF.items()},
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command and returns its exit status."""
    return run_command(argv, lambda: _main(parse_options(values)))


def _main(options: Options) -> int:
    common: dict[str, Any] = {}
    with outputs(None, options.json, lambda: common) as write:
        load = os.getloadavg()[0]
        if load > _QUIET_LOAD:
            print(f"the machine is not idle (load average {load:.1f}): that slows engines whose threads spin the most")
        peaks = find_peaks(options.engine.dtype)
        name = options.engine.model or "the demo model"
        print(
            f"{name}, {options.engine.dtype}, {len(options.workload)} requests, {peaks['provenance']['device']}",
            flush=True,
        )
        common |= report.about(peaks, options.workload_flags, options.engine.dtype, name) | {"load_average": load}
        for record in run(options, peaks):
            write(record)
    return 0


def find_peaks(dtype: str) -> dict[str, Any]:
    """Returns the output of `machine_peaks.py`, run in a process of its own, which leaves no memory or threads behind.

    Raises:
      ValueError: if the process failed.
    """
    script = pathlib.Path(__file__).with_name("machine_peaks.py")
    dtypes = ",".join(dict.fromkeys([dtype, "float32"]))
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), f"--dtypes={dtypes}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"machine_peaks.py failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(options: Options, peaks: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs all rounds, prints the results and yields all records.

    Raises:
      PeerError: if jaxserve failed; another engine that fails is named and left out.
    """
    with contextlib.ExitStack() as stack:
        directory = options.engine.model or DEMO_MODEL
        if options.compare and options.engine.load_format == "dummy":
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="weights_"))
            write_weights(options, directory)
        peers, loaded = start(options, directory, peaks, stack)
        measured: list[Measured] = []
        rounds: list[dict[str, Any]] = []

        def failed(name: str, error: PeerError) -> None:
            if name == OURS:
                raise error
            print(f"{name} failed: {error}", flush=True)

        settings = {"repeats": options.repeats, "timeout_s": options.timeout_s}
        for one in measure(peers, options.workload, failed=failed, **settings):
            measured.append(one)
            rounds.append(report.round_record(one, options.workload))
            yield rounds[-1]
        peak_bytes = {
            name: max([peer.usage().peak_bytes or 0, loaded[name].get("load_peak_bytes") or 0]) or None
            for name, peer in peers.items()
        }
    yield from conclude(options, measured, rounds, loaded, peak_bytes, peaks)


def conclude(
    options: Options,
    measured: Sequence[Measured],
    rounds: Sequence[dict[str, Any]],
    loaded: Mapping[str, dict[str, Any]],
    peak_bytes: Mapping[str, int | None],
    peaks: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Prints and yields the records of all rounds together."""
    by_name = {name: [one for one in measured if one.name == name] for name in loaded}
    by_name = {name: own_rounds for name, own_rounds in by_name.items() if own_rounds}
    summaries = {
        name: report.summary_record(
            [record for record in rounds if record["contender"] == name], loaded[name], peak_bytes[name]
        )
        for name in by_name
    }
    ours = [record for record in rounds if record["contender"] == OURS]
    engine = report.engine_record(ours, by_name[OURS], options.workload, loaded[OURS], dict(peaks))
    report.print_engine(summaries[OURS], engine, options.workload)
    ratios = [report.ratio_record(by_name[OURS], theirs) for name, theirs in by_name.items() if name != OURS]
    if ratios:
        report.print_comparison(list(summaries.values()), ratios)
    yield from [*summaries.values(), engine, *ratios]


def start(
    options: Options, directory: str, peaks: Mapping[str, Any], stack: contextlib.ExitStack
) -> tuple[dict[str, Peer], dict[str, dict[str, Any]]]:
    """Loads the engines, jaxserve first, and returns those that could be loaded, and the answer of each.

    Raises:
      PeerError: if jaxserve could not be loaded.
    """
    peers: dict[str, Peer] = {}
    loaded: dict[str, dict[str, Any]] = {}
    config = options.engine.config
    settings: dict[str, Any] = {
        "model": directory,
        "dtype": options.engine.dtype,
        "max_slots": config.max_slots,
        "max_model_len": config.max_sequence_len,
        "chunk_size": config.chunk_size,
        "pool_bytes": 0,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "platform": peaks["provenance"]["platform"],
    }
    for name in (OURS, *options.compare):
        print(f"loading {name}", file=sys.stderr, flush=True)
        try:
            peers[name] = peer = stack.enter_context(make_peer(name, options))
            message = {"do": "load", "settings": settings | {"options": own_options(name, options)}}
            loaded[name] = peer.ask(message, _LOAD_SECONDS)
        except PeerError as error:
            peers.pop(name, None)
            if name == OURS:
                raise
            what = "is not installed" if isinstance(error, PeerUnavailable) else "could not be loaded"
            print(f"{name} {what}: {error}", flush=True)
            continue
        if name == OURS:
            settings["pool_bytes"] = loaded[name]["pool_bytes"]  # the other engines get as much
    return peers, loaded


def make_peer(name: str, options: Options) -> PeerProcess:
    """Starts the process of an engine.

    Raises:
      PeerUnavailable: if its interpreter does not exist.
    """
    if name == OURS:
        # Several engines share one accelerator, so XLA must not take most of its memory at once.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if options.compare else {}
        return PeerProcess(sys.executable, "peers.jaxserve_driver", **environment)
    module, arguments = PEERS[name]
    return PeerProcess(options.pythons[name], module, arguments)


def own_options(name: str, options: Options) -> dict[str, Any]:
    """Returns the settings that only the engine of this name gets."""
    if name == OURS:
        engine = options.engine
        return {
            "config": dataclasses.asdict(engine.config),
            "seed": engine.seed,
            "compilation_cache_dir": engine.compilation_cache_dir,
            "timeline": options.timeline,
        }
    if name == "llama_cpp":
        server = options.llama_cpp_server
        return {"server": shutil.which(server) or server}
    return {}


def write_weights(options: Options, directory: str) -> None:
    """Writes the random weights as a checkpoint that every engine loads."""
    import jax

    from jaxserve.models.checkpoint.hugging_face import save_hugging_face
    from jaxserve.models.params import random_params

    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # leaves the accelerator's memory to the engines
        params = random_params(options.model, options.engine.seed, options.engine.dtype)
        save_hugging_face(params, options.model, directory, options.engine.dtype)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(main, __doc__ or "")
