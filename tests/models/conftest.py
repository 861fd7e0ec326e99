"""The model zoo, built once per session, and a tiny checkpoint of our own."""

import dataclasses
import pathlib

import jax.numpy as jnp
import pytest
import transformers

from jaxserve.models.checkpoint.hugging_face import save_hugging_face
from tests.models import tiny, zoo


@dataclasses.dataclass(frozen=True)
class Reference:
    """A case of the zoo, as transformers runs it and as it lies on disk."""

    case: zoo.Case
    model: transformers.PreTrainedModel
    directory: pathlib.Path


@pytest.fixture(scope="session")
def zoo_references(tmp_path_factory: pytest.TempPathFactory):
    """`reference(case)`: builds the case on first use."""
    built: dict[str, Reference] = {}

    def reference(case: zoo.Case) -> Reference:
        if case.name not in built:
            directory = tmp_path_factory.mktemp(case.name)
            built[case.name] = Reference(case, zoo.build(case, directory), directory)
        return built[case.name]

    return reference


@pytest.fixture(params=zoo.CASES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, zoo_references) -> Reference:
    """Every case of the zoo in turn."""
    return zoo_references(request.param)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with an untied checkpoint of `tiny.CONFIG` in one file."""
    save_hugging_face(tiny.randomised(tiny.CONFIG), tiny.CONFIG, tmp_path / "model", jnp.float32)
    return tmp_path / "model"
