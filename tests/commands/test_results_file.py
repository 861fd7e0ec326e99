"""A file of results is complete, or it is named partial."""

import json
import os

import pytest

from jaxserve.commands.results_file import ResultsFile


def test_results_take_their_name_when_all_is_done(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("old\n")
    with ResultsFile(path) as results:
        results.write({"text": "é\u2028"})
        assert json.loads(results.partial_path.read_text(encoding="utf-8")) == {"text": "é\u2028"}
        assert path.read_text() == "old\n"
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "é\u2028"}
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_finished_results_are_kept_after_ctrl_c(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt), ResultsFile(path) as results:
        results.write({"id": 1})
        raise KeyboardInterrupt
    assert not path.exists()
    assert results.partial_path.read_text() == '{"id": 1}\n'


def test_results_path_that_cannot_be_written_is_found_at_once(tmp_path):
    with pytest.raises(ValueError, match="cannot write results to .*No such file"):
        ResultsFile(tmp_path / "none" / "results.jsonl")
    with pytest.raises(ValueError, match="cannot write results to .*directory"):
        ResultsFile(tmp_path)


def test_results_go_straight_to_what_is_no_file_and_through_links(tmp_path):
    with ResultsFile("/dev/null") as results:
        results.write({})
    assert not os.path.isfile("/dev/null")
    link, target = tmp_path / "link", tmp_path / "target"
    target.touch()
    link.symlink_to(target)
    with ResultsFile(link) as results:
        results.write({})
    assert link.is_symlink() and target.read_text() == "{}\n"


def test_results_of_an_interrupted_run_are_not_overwritten(tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("{}\n")
    with pytest.raises(ValueError, match="holds results of a run that was interrupted"):
        ResultsFile(tmp_path / "out.jsonl")
    assert partial.read_text() == "{}\n"


def test_a_failure_before_any_result_leaves_no_file(tmp_path):
    with pytest.raises(ValueError), ResultsFile(tmp_path / "out.jsonl"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
