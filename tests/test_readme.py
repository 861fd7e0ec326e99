"""The pages say what is true: their Python runs as it stands there, and what they name is there."""

import dataclasses
import importlib
import pathlib
import re
import shlex

import jax
import pytest
from absl import flags

from jaxserve import SamplingParams
from jaxserve.commands import generation
from jaxserve.commands.flags import parse_flags
from jaxserve.commands.make_engine import make_engine
from jaxserve.commands.options import define_flags, parse_options
from jaxserve.commands.prompts import ChatRequest, parse_prompts
from jaxserve.request import markdown_lines
from pallas_kernels.backend import BACKENDS, check_runs_here

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "jaxserve/README.md",
        "jaxserve/demo_model/README.md",
        "pallas_kernels/README.md",
        "scripts/README.md",
    )
}
USER_PAGE, DEVELOPER_PAGE = PAGES["README.md"], PAGES["jaxserve/README.md"]
PARAMETERS_PAGE = DEVELOPER_PAGE  # has the section "Parameters"
BLOCKS = {
    f"{name}:{index}": block
    for name, text in PAGES.items()
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
TOP_LEVEL = ("jaxserve", "pallas_kernels", "tests", "scripts", "configs", ".ci")
SUFFIXES = "py|md|cc|h|json|jsonl|png|textproto|toml|txt"


def test_the_first_page_is_at_most_two_screens_of_a_newcomers_time() -> None:
    assert len(USER_PAGE.splitlines()) <= 220


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_on_a_page_runs(name: str) -> None:
    # The examples are written for JAX's defaults; the other tests run with stricter ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[name], name, "exec"), {})


def runs_here(backend: str) -> bool:
    """Whether this machine runs the backend without an interpreter."""
    try:
        check_runs_here(backend, interpret=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "jax_triton"])
def test_the_first_command_prints_what_the_page_shows_and_no_token_hangs_on_the_last_bits(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not runs_here(backend):
        pytest.skip(f"the backend {backend} does not run here")
    command, shown = re.findall(r"```(?:bash|text)\n(.*?)```", USER_PAGE, re.DOTALL)[:2]
    # With these sizes the program of the first example in Python serves here too. The tests keep compiled programs themselves.
    sizes = ["--max_slots=8", "--max_model_len=256", "--max_waiting=4096", "--compilation_cache_dir="]
    arguments = [*shlex.split(command.partition("python -m ")[2]), f"--attention_backend={backend}", *sizes]
    values = flags.FlagValues()
    define_flags(values)
    assert parse_flags(arguments, values, str) == ["jaxserve.generate"]
    options = parse_options(values, in_terminal=False)
    engine = make_engine(options.engine)
    assert generation.run(options, lambda _: engine) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
    # Kinds of CPU differ by about 0.01 here.
    params = dataclasses.replace(options.params, logprobs=2)
    for places in engine.generate(list(options.prompts), params)[0].outputs[0].logprobs:
        best, second = sorted((place.logprob for place in places.values()), reverse=True)[:2]
        assert best - second > 0.25


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_is_there(name: str) -> None:
    missing = [path for path in named_paths(PAGES[name]) if not exists(path, (ROOT / name).parent)]
    assert missing == []


def named_paths(text: str) -> set[str]:
    """What stands in backticks or code blocks and looks like a file or folder of the repository, and the targets of links."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    paths = {span.rstrip("/") for span in spans if re.fullmatch(rf"[\w.*/-]+\.(?:{SUFFIXES})|[\w./-]+/", span)}
    paths |= set(re.findall(r"(?:python |[\s=])((?:scripts|tests|configs)/[\w./-]+\.\w+)", text))
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    return paths | {link for link in links if "://" not in link} - {""}


def exists(path: str, folder: pathlib.Path) -> bool:
    """Whether there is such a file, seen from the root or from the page's own folder."""
    if "/" not in path and pathlib.Path(path).suffix in (".json", ".jsonl", ".md", ".png", ".toml", ".txt"):
        return path in ("config.json", "prompts.jsonl") or (ROOT / path).exists() or any(folder.rglob(path))
    return any(any(root.glob(path)) for root in (ROOT, folder)) or ("/" not in path and any(folder.rglob(path)))


@pytest.mark.parametrize("name", PAGES)
def test_every_test_and_every_name_in_a_file_that_a_page_names_is_there(name: str) -> None:
    text = PAGES[name]
    pairs = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    pairs += [(file, function) for function, file in re.findall(r"`(\w+)` in\s`([\w./]+\.py)`", text)]
    for file, listed in re.findall(r"`([\w./]+\.py)` \(((?:`\w+`,? ?)+)\)", text):
        pairs += [(file, function) for function in re.findall(r"`(\w+)`", listed)]
    for file, function in pairs:
        path = ROOT / file if (ROOT / file).is_file() else (ROOT / name).parent / file
        assert has_name(path.read_text(encoding="utf-8"), function), (file, function)


def has_name(source: str, name: str) -> bool:
    """Whether Python source defines a name, or imports it on a line of its own as test modules do that share a suite."""
    places = rf"^ *(?:async )?(?:def|class) {name}\b|^{name}\b.* = |^    {name},$"
    return re.search(places, source, re.MULTILINE) is not None


DOTTED = r"`((?:jaxserve|pallas_kernels)(?:\.\w+)+)`"


@pytest.mark.parametrize("name", PAGES)
def test_every_module_and_name_of_the_package_that_a_page_names_is_there(name: str) -> None:
    for dotted in re.findall(DOTTED, PAGES[name]):
        if dotted.rpartition(".")[2] not in SUFFIXES.split("|"):
            resolve(dotted)


def test_the_new_names_in_the_changelog_are_there() -> None:
    table = re.findall(
        r"^  \| `jaxserve.* \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    names = [dotted for cell in table for dotted in re.findall(DOTTED, cell)]
    assert len(names) > 30
    for dotted in names:
        resolve(dotted)


def resolve(dotted: str) -> object:
    """What a dotted name stands for: a module, or something in one."""
    module, rest = dotted.split("."), []
    while True:
        try:
            value = importlib.import_module(".".join(module))
            break
        except ModuleNotFoundError:
            rest.insert(0, module.pop())
    for attribute in rest:
        value = getattr(value, attribute)
    return value


@pytest.mark.parametrize("name", PAGES)
def test_every_section_that_a_link_leads_to_is_there(name: str) -> None:
    for path, section in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", PAGES[name]):
        if "://" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert section in slugs, (path, section)


def test_the_walk_from_prompt_to_text_names_at_most_nine_files() -> None:
    section = DEVELOPER_PAGE.partition("from prompt to text\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\| `(jaxserve/[\w/]+\.py)` \|", section, re.MULTILINE)
    assert 5 <= len(files) <= 9 and len(set(files)) == len(files)


def test_every_promise_has_a_test() -> None:
    section = DEVELOPER_PAGE.partition("## Promises, and the tests that hold them\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([A-Z].*?) \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) >= 8
    for promise, tests in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", tests)
        assert files and all((ROOT / file).is_file() for file in files), promise


def test_the_table_of_parameters_is_that_of_the_declarations_with_a_test_for_each() -> None:
    section = PARAMETERS_PAGE.partition("## Parameters\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(("| **", "| `"))]
    cell = re.compile(r" (?:`(tests/\S+\.py)::(\w+)` )?\|$")  # the last one
    assert [cell.sub("", line) for line in lines] == markdown_lines(SamplingParams)
    for line in lines:
        match = cell.search(line)
        assert match is not None and (line.startswith("| **") or match[1]), line
        if match[1]:
            assert has_name((ROOT / match[1]).read_text(encoding="utf-8"), match[2]), line


def test_the_line_of_a_prompts_file_is_one() -> None:
    (line,) = re.findall(r"```json\n(.*?)```", DEVELOPER_PAGE, re.DOTALL)
    (request,) = parse_prompts([line.encode()], "README.md", SamplingParams(), "jsonl")
    assert isinstance(request, ChatRequest) and request.request.params.stop == ("\n\n", (13, 13))


def test_a_wrong_name_on_a_page_would_be_noticed() -> None:
    page = "See `jaxserve/nowhere.py`, [this](gone.md) and `python scripts/gone.py --help`; not `out.html` or `id| `."
    assert {path for path in named_paths(page) if not exists(path, ROOT)} == {
        "jaxserve/nowhere.py",
        "gone.md",
        "scripts/gone.py",
    }
