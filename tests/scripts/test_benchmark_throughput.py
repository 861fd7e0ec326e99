"""The throughput benchmark: turns, figures worked out by hand, errors in one sentence; `test_peers.py` has a tiny run."""

from typing import Any

import benchmark_throughput
import pytest
from absl import flags
from lib.engine_options import BENCHMARK
from lib.workloads import WORKLOAD, Workload
from peers import report
from peers.process import PeerError
from peers.rounds import Measured, measure, run_once, same_tokens

from jaxserve.commands.flags import ENGINE, MODEL, describe_flags, parse_flags
from tests.scripts.stub_peer import PEAKS, InProcess, Stub


def values_of(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    benchmark_throughput.define_flags(values)
    values(["benchmark_throughput", *arguments])
    return values


def test_engines_take_turns_in_rotated_order_after_a_round_that_is_not_timed():
    order = []

    class Noted(InProcess):
        def __init__(self, name: str) -> None:
            super().__init__(Stub())
            self.name = name

        def ask(self, message: Any, timeout_s: float) -> dict[str, Any]:
            order.append(self.name)
            return super().ask(message, timeout_s)

    peers = {name: Noted(name) for name in "abc"}
    workload = Workload([[5], [6]], [2, 3])
    found = list(measure(peers, workload, repeats=3, timeout_s=1, failed=lambda *_: None))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [(one.name, one.index) for one in found[:4]] == [("a", 0), ("b", 0), ("c", 0), ("b", 1)]
    assert found[0].seconds == 5.0 and found[0].token_ids == [[0, 1], [0, 1, 2]]
    assert found[0].others_cpu_seconds == 2.0  # one more at each look, of two others


def test_an_engine_that_fails_has_no_further_rounds_and_the_others_go_on():
    class Failing(Stub):
        rounds = 0

        def run(self, prompts, output_lengths):
            self.rounds += 1
            if self.rounds == 3:
                raise RuntimeError("no more")
            return super().run(prompts, output_lengths)

    failures = []
    peers = {"a": InProcess(Stub()), "b": InProcess(Failing())}
    rounds = measure(
        peers,
        Workload([[5]], [2]),
        repeats=3,
        timeout_s=1,
        failed=lambda name, error: failures.append((name, str(error))),
    )
    assert [(one.name, one.index) for one in rounds] == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]
    assert failures == [("b", "RuntimeError: no more")]


def test_too_few_tokens_are_an_error():
    class Lazy(Stub):
        def run(self, prompts, output_lengths):
            return super().run(prompts, [1] * len(prompts))

    with pytest.raises(PeerError, match="generated 2 tokens, not the 5 of the workload"):
        run_once(InProcess(Lazy()), Workload([[5], [6]], [2, 3]), 1)


def test_tokens_count_as_the_same_up_to_the_first_difference_of_their_request():
    assert same_tokens([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]]) == 3 / 5


def one_round(name: str, index: int, seconds: float, spans: list[float] | None = None, **more: Any) -> Measured:
    return Measured(name, index, seconds, spans, [[1, 2], [3, 4]], 0.25 * seconds, more)


def test_figures_of_a_round_and_ratios_of_pairs_are_those_worked_out_by_hand():
    workload = Workload([[1] * 30, [2] * 10], [6, 4])
    record = report.round_record(one_round("x", 0, 2.0, [0.1, 0.2, 0.4]), workload)
    assert (record["requests_per_s"], record["total_tokens_per_s"], record["output_tokens_per_s"]) == (1.0, 25.0, 5.0)
    assert (record["ms_per_token"], record["p90_ms_per_token"], record["others_cpu_share"]) == (200.0, 360.0, 0.25)
    ours = [one_round("jaxserve", index, 1.0 + index, [0.1]) for index in range(3)]  # 1, 2, 3 s
    theirs = [one_round("x", 0, 4.0, [0.3]), one_round("x", 2, 9.0, None)]  # the rounds of index 1 have no pair
    ratio = report.ratio_record(ours, theirs)
    assert (ratio["pairs"], ratio["output_tokens_per_s"], ratio["ms_per_token"]) == (2, 3.5, 3.0)
    assert (ratio["output_tokens_per_s_range"], ratio["same_tokens"]) == ([3.0, 4.0], 1.0)


def test_what_the_steps_did_is_compared_with_the_machine_and_with_weights_and_pool():
    more = {
        "num_steps": 2,
        "num_computed_tokens": 5,
        "mean_occupancy": 0.5,
        "mean_rows": 2.5,
        "num_preemptions": 1,
        "peak_pages": 3,
        "peak_bytes": 1300,
        "flops": [10**11, 10**10],
        "bytes": [10**9, 2 * 10**10],
    }
    rounds = [one_round("jaxserve", index, seconds, **more) for index, seconds in enumerate([9.0, 4.0, 1.0])]
    records = [report.round_record(one, Workload([[1], [2]], [6, 4])) for one in rounds]
    assert "flops" not in records[0]
    loaded = {
        "weights_bytes": 600,
        "pool_bytes": 400,
        "base_bytes": 200,
        "load_peak_bytes": 1250,
        "max_slots": 4,
        "num_pages": 6,
        "versions": {},
    }
    engine = report.engine_record(records, rounds, Workload([[1], [2]], [6, 4]), loaded, PEAKS)
    assert engine["ms_per_step"] == 2000.0 and engine["share_of_pages"] == 0.5
    assert engine["share_of_matmul_rate"] == pytest.approx(1.1e11 / 4 / 1e11)
    assert engine["share_of_read_bandwidth"] == pytest.approx(2.1e10 / 4 / 1e10)
    assert engine["share_of_roofline"] == 0.75 and engine["roofline_tokens_per_s"] == 3.333  # 1 s + 2 s of 4 s
    assert engine["memory_over_weights_and_pool"] == pytest.approx((1300 - 200) / 1000 - 1)
    assert engine["memory_over_weights_and_used_pages"] == pytest.approx((1300 - 200) / (600 + 400 * 3 / 6) - 1)
    assert "provenance" not in engine["peaks"]
    summary = report.summary_record(records, loaded, 77)
    assert (summary["rounds"], summary["seconds"], summary["peak_bytes"]) == (3, 4.0, 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare=tgi"], "--compare: 'tgi' is unknown: use transformers, transformers_cb, vllm, llama_cpp"),
        (["--vllm_python=x"], "--vllm_python has no effect without --compare=vllm: leave it out"),
        (["--max_model_len=100"], "max_model_len=100 is shorter than the longest sequence, "),
        (["--longest_output=9999"], "the longest sequence has "),
        (["--model=no.json"], "no.json"),
        (["--timeline=out.gif"], "must be a file that ends in .png or .html"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(arguments, message, capsys):
    assert benchmark_throughput.main(["x"], values_of(*arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_what_goes_wrong_while_the_peaks_are_measured_is_told():
    with pytest.raises(ValueError, match="machine_peaks.py failed: error: --dtypes: 'int4' is unknown"):
        benchmark_throughput.find_peaks("int4")


def test_help_has_the_flags_in_groups(capsys):
    values = flags.FlagValues()
    benchmark_throughput.define_flags(values)
    with pytest.raises(SystemExit) as left:
        parse_flags(["x", "--help"], values, lambda: describe_flags(values, (BENCHMARK, WORKLOAD, MODEL, ENGINE)))
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == [BENCHMARK, WORKLOAD, MODEL, ENGINE]
    assert any(line.startswith("  --compare=") for line in lines) and any("--max_slots=INT" in line for line in lines)
