"""README's Python runs as it stands there, and the tests that it names are there."""

import pathlib
import re

import jax
import pytest

from jaxserve import SamplingParams
from jaxserve.commands.prompts import ChatRequest, parse_prompts

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["library", "inside-your-own-jit", "event-loop", "your-own-function"])
def test_the_code_in_the_readme_runs(block: str) -> None:
    # The examples are written for JAX's defaults; the other tests run with stricter ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_table_of_parameters_has_every_one_with_a_test_that_is_there() -> None:
    section = TEXT.partition("## Sampling parameters\n")[2].partition("\n## ")[0]
    tests = dict(re.findall(r"^\| `(\w+)` \|.*`(tests/\S+\.py::\w+)` \|$", section, re.MULTILINE))
    assert tests.keys() - {"priority"} == SamplingParams.__dataclass_fields__.keys()
    for name, test in tests.items():
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_test_file_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)", TEXT)
    assert len(named) > 20
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_the_line_of_a_prompts_file_is_one() -> None:
    (line,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (request,) = parse_prompts([line.encode()], "README.md", SamplingParams(), "jsonl")
    assert isinstance(request, ChatRequest) and request.request.params.stop == ("\n\n", (13, 13))
