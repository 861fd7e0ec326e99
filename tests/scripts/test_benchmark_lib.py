"""The parts that benchmarks share: flag values, errors, percentiles, times, tables, plots."""

import dataclasses

import pytest
from absl import flags
from lib.command import run_command
from lib.flag_values import integers, names, options_from_flags, positive_numbers
from lib.plot import Line, Panel, _decade, check_plot, save_plot
from lib.records import spread
from lib.table import Table


def test_lists_in_flags_become_numbers_each_once():
    assert integers("n", ["3", "1", "3"]) == (3, 1)
    assert positive_numbers("rate", ["0.5", "2"]) == (0.5, 2)
    assert names("what", ["all"], ("a", "b")) == ("a", "b") and names("what", ["b", "b"], ("a", "b")) == ("b",)


def test_options_are_the_flags_of_their_names_but_for_those_that_were_checked():
    @dataclasses.dataclass
    class Options:
        count: int
        label: str | None

    values = flags.FlagValues()
    flags.DEFINE_integer("count", 3, "A number.", flag_values=values)
    flags.DEFINE_string("label", None, "A text.", flag_values=values)
    values(["command", "--label=a"])
    assert options_from_flags(Options, values) == Options(3, "a")
    assert options_from_flags(Options, values, count=9) == Options(9, "a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integers("n", ["0"]), "--n: '0' must be an integer from 1"),
        (lambda: integers("n", ["1.5"]), "--n: '1.5' must be"),
        (lambda: integers("n", []), "--n is empty"),
        (lambda: positive_numbers("r", ["-1"]), "--r: '-1' must be a number above 0"),
        (lambda: positive_numbers("r", ["nan"]), "--r: 'nan' must"),
        (lambda: positive_numbers("r", ["inf"]), "--r: 'inf' must"),
        (lambda: names("w", ["c"], ("a", "b")), "--w: 'c' is unknown: use a, b, or all"),
        (lambda: names("w", ["all"], ("a", "b"), all_allowed=False), "--w: 'all' is unknown: use a, b$"),
        (lambda: check_plot("/nowhere/a.png"), "choose an existing directory"),
    ],
)
def test_what_is_no_good_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_percentiles_are_those_of_the_samples():
    assert spread(list(range(1, 102))) == {"mean": 51, "median": 51, "p90": 91, "p99": 100}
    assert spread([]) == {"mean": None, "median": None, "p90": None, "p99": None}


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("--x=1 is bad"), 1, "error: --x=1 is bad\n"),
        (MemoryError(), 1, "error: MemoryError (if memory ran out: lower slots, pages or lengths)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_a_sentence_and_a_status(error, status, text, capsys):
    def work() -> int:
        raise error

    assert run_command(["benchmark"], work) == status
    assert capsys.readouterr().err == text


def test_arguments_that_are_no_flags_are_refused(capsys):
    assert run_command(["benchmark", "x"], lambda: 0) == 1
    assert "unexpected argument 'x'" in capsys.readouterr().err


def test_a_table_leaves_out_what_is_not_known(capsys):
    table = Table({"name": 6, "value": 7, "note": 4})
    table.print_row({"name": "a", "value": 1234.5})
    table.print_row({"name": "b", "value": 0.123456, "note": None})
    assert capsys.readouterr().out.splitlines() == ["  name    value  note", "     a     1234", "     b    0.123"]


def test_flat_curves_are_drawn_flat_and_values_stay_inside(tmp_path):
    low, high = _decade([10.0, 11.0])
    assert high / low == pytest.approx(10) and low < 10 and high > 11
    low, high = _decade([1.0, 1000.0])
    assert low < 1 and high > 1000
    panel = Panel(
        "t", "x", "y", [Line("a", [0, 1], [1.0, 2.0]), Line("b", [0, 1], [1.0, 1.0], True)], log_x=True, log_y=True
    )
    save_plot(str(tmp_path / "a.svg"), [panel], title="t")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    save_plot(str(tmp_path / "b.png"), [], title="nothing to draw")
    assert not (tmp_path / "b.png").exists()
