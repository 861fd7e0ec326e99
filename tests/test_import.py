"""Importing jaxserve is light and leaves no trace (promise P7)."""

import subprocess
import sys


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_starts_no_backend_sets_no_option_and_loads_nothing_heavy() -> None:
    output = run(
        "import sys, jax\n"
        "before = dict(jax.config.values)\n"
        "import jaxserve\n"
        "print([name for name in ('orbax', 'transformers', 'tokenizers', 'torch') if name in sys.modules])\n"
        "print(jax.config.values == before)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
    )
    assert output.splitlines() == ["[]", "True", "False"]


def test_importing_defines_no_flag_of_its_own() -> None:
    output = run(
        "from absl import flags\n"
        "import jaxserve, jaxserve.commands.flags, jaxserve.models.checkpoint.hugging_face\n"
        "own = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith('jaxserve')]\n"
        "print(own)\n"
    )
    assert output.strip() == "[]"
