"""A model is a directory, or is fetched from the hub without pickles and code."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxserve.models.checkpoint import CheckpointError, resolve_model
from tests.models.tiny import INDEX, SINGLE


def test_a_directory_is_itself(saved):
    assert resolve_model(str(saved)) == saved


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../up", "/abs/olute", "", "org/na me"])
def test_neither_a_directory_nor_an_id_is_named(name):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_not_a_model(saved):
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(saved / SINGLE))


def test_a_hub_id_is_downloaded_without_pickles_and_code(monkeypatch, tmp_path):
    seen = {}

    def download(repo_id, *, allow_patterns, ignore_patterns):
        files = [
            "config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "merges.txt",
            "chat_template.jinja", "pytorch_model.bin", "modeling_evil.py", "README.md", "onnx/config.json",
            "original/consolidated.00.pth", "consolidated.safetensors", "evil.pkl",
        ]  # fmt: skip
        filtered = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        seen[repo_id] = list(filtered)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == tmp_path
    assert seen["HuggingFaceTB/SmolLM2-135M"] == [
        "config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "merges.txt", "chat_template.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("offline"), "check the network"),
        (errors.OfflineModeIsEnabled("offline"), "check the network"),
        (ConnectionError("no route"), "check the network"),
        ((errors.RepositoryNotFoundError, 404), "no such model"),
        ((errors.GatedRepoError, 403), "licence"),
    ],
    ids=lambda value: "",
)
def test_a_failed_download_is_one_sentence(error, words, monkeypatch):
    def download(*_, **__):
        if isinstance(error, tuple):
            raise error[0].__new__(error[0])
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/name")
    message = str(caught.value)
    assert "'org/name'" in message and words in message and "\n" not in message
