"""Runs `python -m jaxserve.generate` for tests: in a process of its own, or here with an engine that exists already."""

import pathlib
import subprocess
import sys

import jax
from absl import flags

from jaxserve import Engine
from jaxserve.commands import generation
from jaxserve.commands.options import Options, define_flags, parse_options
from tests import small_model

ROOT = pathlib.Path(__file__).parent.parent


def command(checkpoint: pathlib.Path | str, *arguments: str) -> list[str]:
    """Returns the arguments of a process that serves a checkpoint with the capacities of `small_model`."""
    capacities = [f"--{name}={value}" for name, value in small_model.CAPACITIES.items()]
    cache = f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    model = ["--model", str(checkpoint), "--dtype", "float32", cache]
    return [sys.executable, "-m", "jaxserve.generate", *model, *capacities, *arguments]


def run(checkpoint: pathlib.Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own. Nothing it prints may be a traceback."""
    done = subprocess.run(
        command(checkpoint, *arguments), cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def parse(*arguments: str) -> flags.FlagValues:
    """Returns the command's flags with these arguments."""
    values = flags.FlagValues()
    define_flags(values)
    assert values(["command", *arguments]) == ["command"]
    return values


def options_of(*arguments: str) -> Options:
    """Returns the options that these arguments stand for, where stdin is no terminal."""
    return parse_options(parse(*arguments), in_terminal=False)


def run_here(engine: Engine, *arguments: str) -> int:
    """Runs the command with an engine that exists already; returns the exit status."""
    return generation.run(options_of(*arguments), make_engine=lambda _: engine)
