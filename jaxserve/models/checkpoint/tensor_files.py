"""Safetensors files: the tensors of a model directory are read one at a time, and a file is written one tensor at a time."""

import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")


class CheckpointError(ValueError):
    """A checkpoint cannot be read as the model that it should be."""


class StoredTensor(NamedTuple):
    """A tensor in a file that is not read yet."""

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype_name: str  # in the words of safetensors: "BF16"
    handle: Any

    def read(self) -> np.ndarray:
        """Returns its values, in memory of their own.

        Raises:
          CheckpointError: if the dtype is not supported, or the file cannot be read.
        """
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(
                f"tensor {self.name} in {self.file} is stored as {self.dtype_name}: use one in BF16, F16 or F32"
            )
        try:
            return self.handle.get_tensor(self.name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {self.name} in {self.file} cannot be read ({error})") from None


@contextlib.contextmanager
def open_tensors(directory: pathlib.Path) -> Iterator[dict[str, StoredTensor]]:
    """Opens the tensors of a directory by name: those of `model.safetensors`, or of the files that its index names.

    Only headers are read at first. Only safetensors files are ever opened, because a pickle can run code.

    Raises:
      CheckpointError: if files are missing, damaged, or not what the index says.
    """
    index = _read_index(directory)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(index.values())) if index else [SINGLE_FILE]:
            for tensor in _open_file(directory / file, stack):
                if index and index.get(tensor.name, file) != file:
                    continue
                tensors[tensor.name] = tensor
        for name, file in index.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{directory / INDEX_FILE} places tensor {name} in {file}, which does not hold it: "
                    "download both files again"
                )
        yield tensors


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> list[StoredTensor]:
    try:
        # "pread", because with "mmap" the pages of a mapped file would count as a second copy of the model.
        handle = stack.enter_context(safetensors.safe_open(path, framework="numpy", backend="pread"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: download the whole checkpoint again") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}): download it again") from None
    return [StoredTensor(name, path, tuple(s.get_shape()), s.get_dtype(), handle) for name, s in slices.items()]


def _read_index(directory: pathlib.Path) -> dict[str, str]:
    """Returns the file name of each tensor; empty if the checkpoint is one file."""
    if (directory / SINGLE_FILE).exists():
        return {}
    path = directory / INDEX_FILE
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = list(weight_map.values())
    except FileNotFoundError:
        raise CheckpointError(_nothing_to_read(directory)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f'{path} must be a JSON object whose "weight_map" names a file for each tensor: download it again'
        ) from None
    if not files:
        raise CheckpointError(f"{path} names no tensor: download it again")
    for file in files:
        if not isinstance(file, str) or pathlib.Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names {file!r}: it may only name .safetensors files in its own directory, {directory}"
            )
    return weight_map


def _nothing_to_read(directory: pathlib.Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds {pickles[0]} but no safetensors, and pickled weights are never read, as they can "
            "run code: convert it with transformers' save_pretrained on a machine where you trust it"
        )
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give the directory of a Hugging Face checkpoint"


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Returns `array` in `dtype`, and refuses to turn large values into infinities.

    Raises:
      CheckpointError: if a value does not fit in float16.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if result.dtype == np.float16 and result is not array and not np.isfinite(result).all():
        raise CheckpointError(f"tensor {name} has values that float16 cannot hold: use bfloat16 or float32")
    return result


def write_tensors(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any, arrays: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file tensor by tensor, so that only the current one is in memory, and then replaces `path` by it.

    Args:
      path: the file.
      shapes: shape of each tensor by name, in the order of `arrays`.
      dtype: dtype of all tensors.
      arrays: the tensors.

    Raises:
      ValueError: if an array has another shape or dtype than announced.
    """
    dtype = np.dtype(dtype)
    dtype_name = next(name for name, stored_dtype in _DTYPES.items() if dtype == stored_dtype)
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for (name, shape), array in zip(shapes.items(), arrays, strict=True):
                if array.shape != shape or array.dtype != dtype:
                    raise ValueError(f"tensor {name} is {array.dtype}{array.shape} but {dtype}{shape} was announced")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
