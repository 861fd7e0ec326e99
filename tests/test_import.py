"""Importing jaxserve is light and leaves no trace (promise P7)."""

import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import jaxserve

# Arguments: a package that must be light, modules for a command line, and a package of which every module is imported.
SCRIPT = """
import importlib, json, pkgutil, sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

light, command_line, package = sys.argv[1:]
importlib.import_module(light)
report = {"after the package": loaded("jax", "flax", "numpy", "absl")}
import absl.app, absl.logging
from absl import flags
names = set(flags.FLAGS)
for module in command_line.split(","):
    importlib.import_module(module)
report["after the command line"] = loaded("jax", "flax", "transformers", "tokenizers")
own = set(flags.FLAGS) - names

import flax.nnx, jax
from jax._src import xla_bridge
options, names = dict(jax.config.values), set(flags.FLAGS)
parent = importlib.import_module(package)
for module in pkgutil.walk_packages(parent.__path__, f"{package}."):
    importlib.import_module(module.name)
report["after all modules"] = loaded("orbax", "transformers", "tokenizers", "torch", "matplotlib")
report["options"] = sorted(name for name, value in jax.config.values.items() if options.get(name, ...) != value)
report["flags"] = sorted(own | (set(flags.FLAGS) - names))
report["starts a backend"] = xla_bridge.backends_are_initialized()
print(json.dumps(report))
"""
COMMAND_LINE = "jaxserve.generate,jaxserve.commands.flags,jaxserve.commands.options,jaxserve.commands.entries"
CLEAN = {
    "after the package": [],
    "after the command line": [],
    "after all modules": [],
    "options": [],
    "flags": [],
    "starts a backend": False,
}


def report_of(light: str, command_line: str, package: str, path: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, light, command_line, package],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path]), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_loads_nothing_heavy_defines_no_flag_sets_no_option_and_starts_no_backend() -> None:
    assert report_of("jaxserve", COMMAND_LINE, "jaxserve") == CLEAN


def test_each_of_these_faults_would_be_reported(tmp_path: pathlib.Path) -> None:
    faults = {
        "heavy/__init__.py": "import numpy",
        "heavy/command.py": "import jax; from absl import flags; flags.DEFINE_integer('early', 1, '', module_name='Group')",
        "faults/__init__.py": "import tokenizers",
        "faults/config.py": "import jax; jax.config.update('jax_numpy_rank_promotion', 'raise')",
        "faults/flags.py": "from absl import flags; flags.DEFINE_integer('own', 1, '', module_name='Group')",
        "faults/device.py": "import jax; jax.devices()",
    }
    for name, text in faults.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert report_of("heavy", "heavy.command", "faults", str(tmp_path)) == {
        "after the package": ["numpy"],
        "after the command line": ["jax"],
        "after all modules": ["tokenizers"],
        "options": ["jax_numpy_rank_promotion"],
        "flags": ["early", "own"],
        "starts a backend": True,
    }


def test_every_public_name_is_what_type_checkers_see() -> None:
    """The imports for type checkers and the table for `__getattr__` name the same objects."""
    source = ast.parse(pathlib.Path(jaxserve.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    imports = {
        name.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert sorted(imports) == sorted(jaxserve.__all__)
    for name, module in imports.items():
        assert getattr(jaxserve, name) is getattr(importlib.import_module(module), name), name
    assert set(jaxserve.__all__) <= set(dir(jaxserve))


def test_no_public_name_is_that_of_a_module_which_could_take_its_place() -> None:
    """Importing `jaxserve.x` sets the attribute x of the package: a function of that name would be lost."""
    folder = pathlib.Path(jaxserve.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(jaxserve.__all__)
    for name in ("config", "core", "demo_model", "engine", "grammar", "models", "request", "text", "timeline"):
        assert getattr(jaxserve, name) is sys.modules[f"jaxserve.{name}"]


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'jaxserve' has no attribute 'Engin'"):
        _ = jaxserve.Engin  # type: ignore[attr-defined]
