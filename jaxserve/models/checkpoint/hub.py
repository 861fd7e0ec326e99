"""Where a checkpoint is: a directory, or a download from the Hugging Face hub."""

import pathlib
import re

from jaxserve.models.checkpoint.tensor_files import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
# Exports to other formats, and the second copy of the weights that Mistral publishes.
_HUB_FILES_TO_SKIP = ["*/*", "consolidated*"]


def resolve_model(path_or_id: str) -> pathlib.Path:
    """Returns the directory of a checkpoint: `path_or_id` itself, or a download of "org/name" from the Hugging Face hub.

    Only JSON, safetensors and tokenizer files are downloaded: neither pickles nor code.

    Raises:
      CheckpointError: if it is neither a directory nor a hub id, or the hub cannot provide it.
    """
    path = pathlib.Path(path_or_id)
    if path_or_id and path.is_dir():
        return path
    if path_or_id and path.exists():
        raise CheckpointError(f"model {path_or_id!r} is a file: give the directory that holds it")
    if not _HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(
            f"model {path_or_id!r} is neither a directory nor a Hugging Face hub id: give an existing directory or "
            'an id such as "HuggingFaceTB/SmolLM2-135M"'
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        directory = huggingface_hub.snapshot_download(
            path_or_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_TO_SKIP
        )
    except errors.GatedRepoError:
        why = "the hub asks for its licence to be accepted: accept it on its page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or it is private: correct the id, or log in with `hf auth login`"
    except Exception as error:  # network libraries each raise their own
        why = f"the download failed ({type(error).__name__}): check the network, or give a directory"
    else:
        return pathlib.Path(directory)
    raise CheckpointError(f"model {path_or_id!r} is not a directory here, and {why}")
