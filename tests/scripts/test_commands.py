"""Every script as a command: it can be imported alone, its flags share one set of names, and it prints its help."""

import json
import os
import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"

# Runs each script that is named with --help, and prints what each printed. All in one process, because importing JAX is slow.
PROGRAM = """
import contextlib, io, json, runpy, sys
from absl import app, flags

app.define_help_flags()
before, helps = set(flags.FLAGS), {}
for script in sys.argv[1:]:
    sys.argv, output = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        helps[script] = output.getvalue()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
print(json.dumps(helps))
"""


def test_every_script_starts_and_prints_its_help():
    paths = sorted(map(str, SCRIPTS.glob("*.py")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout.splitlines()[-1])
    assert len(paths) >= 12 and sorted(helps) == paths
    assert all("--" in text for text in helps.values())
