"""The comparison of a whole pool with a part of it, as a command."""

import json
import pathlib
import subprocess
import sys

from tests.small_model import TINY_CONFIG

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "check_workload.py"


def run(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    sizes = ("--num_requests=8", "--max_slots=4", "--max_model_len=160", "--page_size=8", "--longest_output=24")
    command = [sys.executable, str(SCRIPT), f"--model={folder}/config.json", *sizes, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_smaller_pool_preempts_and_changes_no_token(tmp_path):
    done = run(tmp_path, "--pool_share=0.4")
    *runs, verdict = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [record["num_pages"] for record in runs] == [80, 32] and all(record["requests"] == 8 for record in runs)
    assert verdict["requests_that_differ"] == 0 and verdict["preemptions"] > 0


def test_a_pool_that_holds_no_sequence_gets_one_sentence(tmp_path):
    done = run(tmp_path, "--pool_share=0.1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "num_pages=8 cannot hold one longest sequence" in done.stderr
