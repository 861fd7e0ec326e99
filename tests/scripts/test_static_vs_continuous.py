"""Static against continuous batching: the counts agree with a scheduler of a few lines and with hand-made cases."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import benchmark_static_vs_continuous as benchmark
import jax
import numpy as np
import pytest
from absl import flags
from batching import report, runs
from batching.runs import Contender
from lib.workloads import Workload

from jaxserve import Engine, EngineConfig
from jaxserve.timeline.record import Steps
from tests import small_model

SLOTS = 4
CAPACITIES = small_model.CAPACITIES | {"chunk_size": 64, "num_pages": 48, "max_queue": 12}
SHAPE = pathlib.Path(__file__).parents[2] / "configs" / "models" / "llama-135m.json"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Prompts are short, and a step has room for all of them: a sequence of n tokens takes n steps."""
    return Engine(small_model.make_params(), small_model.MODEL, EngineConfig(**CAPACITIES, kv_dtype="float32"))


@pytest.fixture(scope="module")
def workload() -> Workload:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 300, length).tolist() for length in rng.integers(1, 9, 18)]
    return Workload(prompts, rng.integers(1, 40, 18).tolist())


def simulate(outputs: list[int], batch_size: int) -> tuple[int, list[int]]:
    """Steps, and for each sequence the step in which it gets a slot: first come first served, a batch at a time."""
    step, starts = 0, []
    for first in range(0, len(outputs), batch_size):
        batch = outputs[first : first + batch_size]
        free_from = [step] * SLOTS
        for length in batch:
            slot = free_from.index(min(free_from))
            starts.append(free_from[slot])
            free_from[slot] += length
        step = max(free_from)
    return step, starts


@pytest.mark.parametrize("batch_size", [SLOTS, None])
def test_steps_queue_and_waste_are_those_of_a_simulation(
    engine: Engine, workload: Workload, batch_size: int | None
) -> None:
    contender = Contender("x", engine, batch_size)
    run = runs.serve(contender, workload)
    steps, starts = simulate(workload.output_lengths, batch_size or len(workload))
    measured = runs.measures(contender, [run], workload)
    assert (measured["steps"], run.queue_steps) == (steps, starts)
    assert measured["wasted_slot_steps"] == steps * SLOTS - workload.num_output_tokens
    assert measured["mean_occupancy"] == pytest.approx(workload.num_output_tokens / (steps * SLOTS))
    assert measured["queue_steps_mean"] == pytest.approx(np.mean(starts))
    assert measured["computed_tokens"] == workload.num_prompt_tokens + workload.num_output_tokens - len(workload)
    waiting = run.timeline.steps().num_waiting.tolist()
    assert waiting == [sum(start > step for start in starts) for step in range(steps)]
    assert measured["in_flight_peak"] == SLOTS and measured["preemptions"] == 0
    assert [len(tokens) for tokens in run.token_ids] == workload.output_lengths
    assert all(0 <= seconds < run.seconds for seconds in run.queue_seconds)
    order = np.argsort(run.queue_steps, kind="stable")
    assert (np.diff(np.array(run.queue_seconds)[order]) >= 0).all() and run.queue_seconds[0] == 0


def test_contenders_take_turns_and_ratios_are_those_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"a": iter([1.0, 4.0, 9.0]), "b": iter([1.0, 2.0, 3.0])}
    order: list[str] = []

    def serve(contender: Any, workload: Any) -> Any:
        order.append(contender.name)
        steps = 7 if contender.name == "a" else 2
        return types.SimpleNamespace(
            seconds=next(seconds[contender.name]), timeline=types.SimpleNamespace(num_steps=steps)
        )

    monkeypatch.setattr(runs, "serve", serve)
    contenders: Any = [types.SimpleNamespace(name=name) for name in "ab"]
    a, b = runs.compare(contenders, Workload([[1]], [1]), 3)
    assert "".join(order) == "abbaab"
    assert runs.ratios(b, a) == {"speed_up": 2.0, "steps_ratio": 3.5}


def test_bytes_that_hold_tokens_are_counted_while_any_waits() -> None:
    occupant = np.array([[0, 1], [0, 1], [0, 2], [-1, 2]], np.int32)
    num_new = np.array([[5, 3], [1, 1], [1, 6], [0, 1]], np.int32)
    none = np.zeros(4, np.int32)
    steps = Steps(occupant, num_new, num_new == 1, np.array([2, 2, 2, 3]), np.array([2, 1, 0, 0]), none)
    config = EngineConfig(max_slots=2, num_pages=4, page_size=8, max_model_len=16)
    paged = runs.memory_use(steps, config, reserved=False)
    assert paged["busy_steps"] == 2 and paged["in_flight_mean"] == 2 and paged["in_flight_peak"] == 2
    assert paged["live_share_of_pool"] == pytest.approx((8 + 10) / 2 / 32)
    assert paged["live_share_of_held"] == pytest.approx((8 + 10) / (4 * 8))
    all_along = dataclasses.replace(steps, num_waiting=none)  # no request ever waited
    reserved = runs.memory_use(all_along, config, reserved=True)
    assert reserved["in_flight_mean"] == 7 / 4
    assert reserved["live_share_of_held"] == pytest.approx((8 + 10 + (7 + 6) + 7) / (7 * 16))


def test_padding_runs_full_batches_of_the_longest_prompt_and_output() -> None:
    workload = Workload([[1] * 2, [1] * 4, [1] * 3], [10, 1, 5])
    padded = runs.padding(workload, 2)
    assert padded["padded_slot_steps"] == 2 * 10 + 2 * 5
    assert padded["padded_rows"] == 2 * (4 + 9) + 2 * (3 + 4)
    assert padded["padded_rows_over_needed"] == pytest.approx(40 / (9 + 16 - 3))


def test_the_textbook_has_equal_shares_and_fixed_is_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    drawn = runs.draw_outputs("textbook", 16, 256, 40, rng)
    assert sorted(drawn) == [length for length in runs.TEXTBOOK for _ in range(10)] != drawn
    assert runs.draw_outputs("fixed", 16, 256, 3, rng) == [136] * 3
    heavy = runs.draw_outputs("heavy", 16, 256, 500, rng)
    assert min(heavy) >= 16 and max(heavy) <= 256 and np.median(heavy) < np.mean(heavy)


def options_for(*arguments: str) -> tuple[benchmark.Options, flags.FlagValues]:
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["command", *arguments])
    return benchmark.parse_options(values), values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distributions=heavy,light"], "'light' is unknown: use fixed, uniform,"),
        (["--distributions="], "--distributions"),
        (["--output_lengths=heavy"], "add workload to --distributions"),
        (["--pool_share=1"], "--pool_share=1.0 must lie between 0 and 1"),
        (["--nomemory", "--pool_share=0.5"], "--pool_share has no effect on --nomemory"),
        (["--timeline=x.pdf"], "'x.pdf' must be a file that ends in .png or .html"),
        (["--plot=x.html"], "--plot=x.html must be a file that ends in .png"),
    ],
)
def test_flags_that_are_not_valid_are_refused_in_a_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        options_for(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pool_without_room_for_one_longest_sequence_is_refused() -> None:
    assert benchmark.num_reserved_slots(0.5, 5) == 2
    with pytest.raises(ValueError, match="--pool_share=0.2 of 4 slots holds no longest sequence"):
        benchmark.num_reserved_slots(0.2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_model_len=40"], "max_model_len=40 is shorter than the longest sequence of the workload, "),
        (["--num_requests=32"], "--num_requests=32 must be above max_slots=32"),
        (["--num_pages=4096"], "num_pages=4096 has no effect"),
    ],
)
def test_what_would_compare_nothing_is_refused_before_an_engine_is_made(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.run(*options_for(f"--model={SHAPE}", *arguments))


def test_every_distribution_has_the_same_prompts() -> None:
    options, values = options_for(f"--model={SHAPE}", "--num_requests=6", "--distributions=workload,textbook,uniform")
    made = benchmark.make_workloads(options, values, benchmark.fitted_options(values))
    assert list(made) == ["workload", "textbook", "uniform"]
    assert made["workload"].prompts == made["textbook"].prompts
    assert set(made["textbook"].output_lengths) == {10, 20, 50, 100}


def record(distribution: str, contender: str, **over: tuple[float, float]) -> dict[str, Any]:
    names = {"static": "static", "reserved": "continuous, reserved", "both": "static, reserved"}
    ratios = {names[name]: {"speed_up": speed, "steps_ratio": steps} for name, (speed, steps) in over.items()}
    return {"distribution": distribution, "contender": contender, "over": ratios}


def test_the_verdict_says_where_the_claim_holds() -> None:
    lines = report.verdict(
        [
            record("fixed", "static"),
            record("fixed", "continuous", static=(1.0, 1.1)),
            record("heavy", "continuous", static=(2.5, 3.0)),
            record("heavy", "continuous, paged", reserved=(1.2, 1.3), both=(25.0, 4.0)),
        ]
    )
    assert [line.strip() for line in lines if "hold:" in line or "holds:" in line] == [
        "holds: heavy 2.50x (3.00x)",
        "does not hold: fixed 1.00x (1.10x)",
        "holds: nowhere",
        "does not hold: heavy 1.20x (1.30x)",
        "holds: nowhere",
        "does not hold: heavy 25.00x (4.00x)",
    ]


@pytest.mark.slow
def test_the_whole_benchmark_in_a_tiny_form(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model.write_checkpoint(tmp_path) / "config.json"
    arguments = [
        # With these capacities the first engine has the programs of the one above.
        *(f"--{name}={value}" for name, value in CAPACITIES.items() if name != "num_pages"),
        *(f"--model={model}", "--dtype=float32", "--num_requests=12", "--repeats=1"),
        *("--longest_prompt=20", "--shortest_output=2", "--longest_output=24", "--distributions=heavy,uniform"),
        *("--pool_share=0.5", f"--json={tmp_path / 'out.jsonl'}", f"--plot={tmp_path / 'out.png'}"),
        *(f"--timeline={tmp_path / 'out.html'}", f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"),
    ]
    options, values = options_for(*arguments)
    assert benchmark.run(options, values) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(one["part"], one["distribution"], one["contender"]) for one in records] == [
        *(("batching", name, contender) for name in ("heavy", "uniform") for contender in ("static", "continuous")),
        *(
            ("memory", name, f"{contender}")
            for name in ("heavy", "uniform")
            for contender in ("static, reserved", "continuous, reserved", "continuous, paged")
        ),
    ]
    for one in records:
        assert one["tokens_equal"] and one["commit"] and one["method"] and one["jax"] == jax.__version__
    static, continuous, _, _, _, reserved, paged, *_ = records
    assert continuous["over"]["static"]["steps_ratio"] == pytest.approx(static["steps"] / continuous["steps"], rel=1e-3)
    assert static["steps"] > continuous["steps"] and static["slots"] == paged["slots"] == 4
    assert reserved["slots"] == 2 and reserved["num_pages"] == paged["num_pages"] == static["num_pages"] // 2
    assert reserved["preemptions"] == 0 and paged["in_flight_mean"] > reserved["in_flight_mean"]
    assert paged["live_share_of_held"] > reserved["live_share_of_held"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    pictures = {path.name for path in tmp_path.glob("out-*.html")}
    assert pictures == {
        f"out-{name}.html"
        for name in ("static", "continuous", "static-reserved", "continuous-reserved", "continuous-paged")
    }
    output = capsys.readouterr().out
    assert "padded rows" in output and "where the 2x to 24x of the literature hold" in output
