"""The scaling benchmark: that its states are what they claim to be, its stub is the scheduler, and its lines fit."""

import dataclasses
import json

import benchmark_scaling
import jax
import numpy as np
import pytest
from absl import flags
from benchmark_scaling import describe_fit, fit_line, fits_of
from scaling.cases import SWEEPS, Base, busy_state, make_cases
from scaling.timing import Bench, Program, make_stub, stub_model

from jaxserve import EngineConfig, ModelConfig, Status, check_invariants
from jaxserve.core.cache import init_kv_pool
from jaxserve.models.families import read_model_config
from tests.small_model import TINY_CONFIG

STUB_CONFIG = (
    TINY_CONFIG
    | {  # of a config.json: the model that stands for all others in "rest", so that both share a program
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
)

MODEL = ModelConfig("llama", 64, 8, 8, 1, 1, 1, 2)
BASE = Base(slots=4, context=20, vocab_size=64, num_steps=6, page_size=8)
ENGINE = EngineConfig(page_size=8, kv_dtype="float32", attention_backend="reference")
POINTS = {
    "slots": (1, 3),
    "active": (0, 2),
    "long": (40,),
    "context": (9, 30),
    "capacity": (40, 80),
    "pages": (50,),
    "queue": (0, 9),
    "vocabulary": (64, 70),
    "turnover": (0, 2, 4),
}


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    benchmark_scaling.define_flags(values)
    values(["benchmark_scaling", *arguments])
    return benchmark_scaling.main(["benchmark_scaling"], values)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_states_of_a_sweep_are_valid_and_differ_in_what_it_varies(name):
    assert POINTS.keys() == SWEEPS.keys()
    cases = make_cases(name, BASE, POINTS[name])
    assert [case.value for case in cases if case.series in ("", "even")] == list(POINTS[name])
    for case in cases:
        model = dataclasses.replace(MODEL, vocab_size=case.vocab_size)
        config = case.config(ENGINE, BASE.num_steps)
        state = busy_state(case, model, config, seed=1)
        pool = init_kv_pool(model, case.num_pages, 8, "float32", as_bits=False)
        check_invariants(state.replace(pool=pool))
        status = np.asarray(state.queue.status)
        assert (status == Status.WAITING).sum() == case.waiting
        assert np.asarray(state.active).tolist() == [slot < len(case.lengths) for slot in range(case.slots)]
        assert np.asarray(state.slots.num_computed)[: len(case.lengths)].tolist() == [n - 1 for n in case.lengths]
    shapes = {(case.max_model_len, case.num_pages, case.queue_size, case.slots) for case in cases}
    assert len(shapes) == (len(cases) if name in ("slots", "capacity", "queue") else 1)


def test_one_long_sequence_is_compared_with_as_many_tokens():
    one, even = make_cases("long", BASE, (100,))
    assert max(one.lengths) == 100 and max(even.lengths) - min(even.lengths) <= 1
    assert sum(one.lengths) == sum(even.lengths) and one.max_model_len == even.max_model_len


@pytest.mark.parametrize("name", SWEEPS)
def test_usual_values_that_do_not_fit_are_left_out(name):
    base = dataclasses.replace(BASE, slots=12, context=256, num_steps=1000)
    values = {case.value for case in make_cases(name, base)}
    left_out = {"active": {16, 24, 32}, "turnover": {8, 16}, "capacity": {1024}, "pages": {1000}}
    assert values == set(SWEEPS[name].values) - left_out.get(name, set())


def test_values_that_make_no_sense_are_refused():
    for name, value, message in [
        ("active", 5, "more than --slots=4"),
        ("turnover", 3, "must divide --slots=4"),
        ("pages", 3, "fewer than the"),
        ("capacity", 21, "has no room for 28"),
        ("slots", 0, "below 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_cases(name, BASE, (value,))


def test_the_stub_turns_over_as_many_sequences_as_it_should_and_copies_no_tokens():
    case = make_cases("turnover", BASE, (2,))[0]
    config = case.config(ENGINE, BASE.num_steps)
    state = busy_state(case, MODEL, config, seed=1)
    program = make_stub(config)
    text = program.run.lower(state, np.int32(2)).compile().as_text()  # type: ignore[attr-defined]
    shape = f"s32[{case.queue_size},{case.max_model_len}]"
    assert shape in text and not [line for line in text.splitlines() if f" {shape}" in line and " copy(" in line]
    bench = Bench(case, config, state, program, BASE.num_steps)
    for _ in range(3):
        bench.take_sample()
    assert len(bench.timing().samples) == 3 and bench.timing().one_call > 0


def test_the_scheduler_is_measured_with_a_million_pages_whatever_the_model():
    case = dataclasses.replace(make_cases("pages", BASE, (50,))[0], num_pages=1_000_000)
    config = case.config(EngineConfig(kv_dtype="bfloat16", page_size=32), BASE.num_steps)
    state = busy_state(case, stub_model(64), config, seed=0)
    assert state.table.num_pages == 1_000_000 and int(state.table.num_free) == 1_000_000 - BASE.slots


def test_steps_that_do_other_than_the_case_says_are_not_timed():
    case = make_cases("slots", BASE, (2,))[0]
    config = case.config(ENGINE, BASE.num_steps)
    idle = Program(lambda state, n: (state, None), lambda *_: np.zeros(2, np.int32))
    with pytest.raises(RuntimeError, match=r"slots 2: in 1 steps the slots drew \[0\] tokens"):
        Bench(case, config, busy_state(case, MODEL, config, seed=0), idle, BASE.num_steps)


def test_a_line_is_found_and_the_worst_point_named():
    assert fit_line([0, 1, 10, 100], [3, 5, 23, 203]) == pytest.approx((3, 2, 0), abs=1e-9)
    constant, slope, residual = fit_line([1, 2], [10, 20])
    assert (constant, slope, residual) == pytest.approx((0, 10, 0), abs=1e-9)
    assert fit_line([1, 2, 3], [10, 30, 10])[2] > 0.3


def test_constants_are_given_per_unit_and_long_sequences_against_even_ones():
    about = {"status": "timed", "what": "step", "series": ""}
    pages = [about | {"sweep": "pages", "value": n, "median_us": 7 + n / 500} for n in (1000, 10_000, 100_000)]
    noise = about | {"sweep": "pages", "value": 5, "median_us": -1.0}
    (fit,) = fits_of("pages", "step", [*pages, noise])
    assert (fit["us_per_step"], fit["us_per_unit"], fit["unit"]) == (pytest.approx(7), pytest.approx(2), "1000 pages")
    assert fit["cost_of_last_to_first"] == pytest.approx(207 / 9, rel=1e-3) and not fit["should_be_flat"]
    assert "7 us + 2 us per 1000 pages (worst point 0% off); 23x from 1000 to 100000" in describe_fit(fit)
    long = [
        about | {"sweep": "long", "series": series, "value": 500, "median_us": cost}
        for series, cost in (("one long", 30.0), ("even", 20.0))
    ]
    (ratio,) = fits_of("long", "step", long)
    assert describe_fit(ratio) == "one sequence of 500 tokens among short ones: 1.50x of as many spread evenly"


def test_the_command_measures_all_kinds_and_fits_lines(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(STUB_CONFIG))
    assert read_model_config(tmp_path / "config.json") == stub_model(TINY_CONFIG["vocab_size"])
    (tmp_path / "engine.json").write_text('{"page_size": 8, "attention_backend": "reference"}')
    out, plot = tmp_path / "out.jsonl", tmp_path / "out.png"
    assert (
        run(
            *("--sweep=long", "--points=30,60", "--slots=2", "--steps=3", "--repeats=2", "--dtype=float32"),
            *(f"--model={tmp_path}/config.json", f"--engine_config={tmp_path}/engine.json"),
            *(f"--json={out}", f"--plot={plot}"),
        )
        == 0
    ), capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    timed = [record for record in records if record["kind"] == "measurement"]
    assert [(r["what"], r["series"], r["value"]) for r in timed] == [
        (what, series, value)
        for what in ("scheduler", "rest", "step")
        for value in (30, 60)
        for series in ("one long", "even")
    ]
    assert all(
        r["status"] == "timed" and r["jax"] == jax.__version__ and r["num_tokens"] == r["value"] + 64 for r in timed
    )
    assert "microseconds per step" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep=speed"], "--sweep: 'speed' is unknown: use slots"),
        (["--points=3"], "--points are of one sweep"),
        (["--sweep=slots", "--points=x"], "--points: 'x' must be an integer"),
        (["--sweep=turnover", "--what=step"], "about the scheduler only"),
        (["--plot=a.gif"], "must be a file that ends in .png"),
        (["--model=nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_flags_get_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
