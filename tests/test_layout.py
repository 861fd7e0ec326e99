"""The layout of the repository: imports point down only and form no cycle, and no file or folder grows without notice."""

import ast
import graphlib
import pathlib
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("jaxserve", "pallas_kernels")
HOLDS_COMMANDS = ("benchmark_", "compile_gate", "evaluate_demo_model", "machine_peaks", "train_demo_model")

# From the top of the house to its ground: a module imports modules of its own line and of the lines below, never above.
# A line names modules; a package stands for all that is in it, except for what another line names.
FLOORS = """
jaxserve
jaxserve.generate
jaxserve.commands
jaxserve.timeline
jaxserve.engine
jaxserve.grammar
jaxserve.core jaxserve.core.programs jaxserve.core.beam_search
jaxserve.core.step
jaxserve.core.forward jaxserve.core.draw
jaxserve.core.run_model
jaxserve.core.make_submission
jaxserve.core.scheduler
jaxserve.core.cache
jaxserve.core.sampling jaxserve.core.vocab_search
jaxserve.core.logits_fn
jaxserve.core.logit_rules
jaxserve.core.optional jaxserve.core.pytree jaxserve.core.compile_guard
jaxserve.core.columns
jaxserve.text jaxserve.demo_model
jaxserve.models
jaxserve.models.checkpoint
jaxserve.models.families
jaxserve.models.bind jaxserve.models.dense
jaxserve.models.prepare
jaxserve.models.native
jaxserve.models.params
jaxserve.models.transformer
jaxserve.models.layers jaxserve.models.rope
jaxserve.models.config
jaxserve.config
jaxserve.request
pallas_kernels
pallas_kernels.rotary_write
pallas_kernels.paged_attention
pallas_kernels.native
pallas_kernels.backend
pallas_kernels.native.library pallas_kernels.pages
""".splitlines()


def _modules(folder: str) -> dict[str, pathlib.Path]:
    """Returns the Python files below a folder by their module names; names of scripts start below `scripts/`."""
    modules = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT / folder if folder == "scripts" else ROOT).with_suffix("")
        modules[".".join(relative.parts).removesuffix(".__init__")] = path
    return modules


def _imports(path: pathlib.Path, modules: Iterable[str]) -> set[str]:
    """Returns the modules, of those given, that a file imports anywhere, in functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import: name the package"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            names |= inner or {node.module}
    return names & set(modules)


def _floor_of(module: str, floors: dict[str, int]) -> int:
    while module not in floors:
        module = module.rpartition(".")[0]
        assert module, "a module stands on no floor: add it to FLOORS"
    return floors[module]


def _arrows_up(imports: dict[str, set[str]], floors: dict[str, int]) -> list[str]:
    """Returns the imports that point from a floor to a higher one; no module of the package may import the package itself."""
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if _floor_of(other, floors) < _floor_of(module, floors)
    ]


def _floors(lines: list[str]) -> dict[str, int]:
    return {module: number for number, line in enumerate(lines) for module in line.split()}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    modules = _modules("jaxserve") | _modules("pallas_kernels")
    return {name: _imports(path, modules) for name, path in modules.items()}


def test_imports_point_down_only(imports):
    assert _arrows_up(imports, _floors(FLOORS)) == []


def test_an_import_that_points_up_is_found(imports):
    wrong = imports | {"jaxserve.request": {"jaxserve.config"}}
    assert _arrows_up(wrong, _floors(FLOORS)) == ["jaxserve.request imports jaxserve.config"]


def test_every_line_of_floors_names_modules_that_exist(imports):
    assert set(_floors(FLOORS)) <= imports.keys()


def test_imports_form_no_cycle(imports):
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError with the cycle
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(imports | {"jaxserve.request": {"jaxserve.core.step"}}).static_order())


def test_kernels_never_import_the_engine():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        assert not _imports(path, _modules("jaxserve")), path


def test_scripts_form_no_cycle_and_import_no_test_and_no_other_command():
    modules, tests = _modules("scripts"), {*_modules("tests"), "tests"}
    imports = {name: _imports(path, modules) for name, path in modules.items()}
    list(graphlib.TopologicalSorter(imports).static_order())
    for name, path in modules.items():
        assert not _imports(path, tests), f"{name} imports tests"
        commands = {other for other in imports[name] if "." not in other}
        assert not commands, f"{name} imports the commands {commands}: move what they share into a folder of scripts/"


def test_names_of_script_folders_are_no_names_of_packages():
    folders = {path.name for path in (ROOT / "scripts").iterdir() if path.is_dir()}
    trap = {"kernels", "tests", "data"} | set(sys.stdlib_module_names)  # transformers looks for a package `kernels`
    assert not folders & trap


def test_the_top_of_scripts_holds_commands_only():
    for path in (ROOT / "scripts").glob("*.py"):
        assert path.name.startswith(HOLDS_COMMANDS), f"{path.name}: helpers belong into a folder per job"
        assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"), path.name


def test_no_test_module_imports_another():
    modules = _modules("tests")
    for name, path in modules.items():
        others = {other for other in _imports(path, modules) if other.rpartition(".")[2].startswith("test_")}
        assert not others, f"{name} imports {others}: move what they share into a plain module beside them"


def test_packages_initialise_nothing():
    """An `__init__.py` only hands names on: no function, class or computation, but for lazy imports of the package itself."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            kinds = {type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body}
            if path not in {ROOT / "jaxserve" / "__init__.py", ROOT / "jaxserve" / "demo_model" / "__init__.py"}:
                assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, path


def test_files_and_folders_keep_their_size():
    for folder in (*PACKAGES, "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            assert num_lines <= 450, f"{path.relative_to(ROOT)} has {num_lines} lines: look for its seam"
    entries = [path.name for path in (ROOT / "jaxserve").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 14, f"jaxserve/ has {len(entries)} entries: {sorted(entries)}"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
