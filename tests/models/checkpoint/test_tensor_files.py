"""Damaged, incomplete and unsafe files are named in one sentence."""

import json
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxserve.models.checkpoint.hugging_face import load_hugging_face
from tests.models.tiny import INDEX, Q_PROJ, SINGLE, assert_equal, assert_refused


def shard(directory: pathlib.Path) -> dict:
    """Splits the single file in two and returns its index."""
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.numpy.save_file(part, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_a_sharded_checkpoint_is_one_model(saved):
    expected = load_hugging_face(saved, dtype=jnp.float32)
    shard(saved)
    assert_equal(load_hugging_face(saved, dtype=jnp.float32), expected)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(num_bytes, saved):
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(content[:num_bytes])
    assert_refused(saved, str(saved / SINGLE), "not a complete safetensors file")


def header_of(path: pathlib.Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[Q_PROJ].update(data_offsets=[0, 4]),
        lambda header: header[Q_PROJ].update(data_offsets=[-4, 1532]),
        lambda header: header[Q_PROJ].update(dtype="F32X"),
        lambda header: header[Q_PROJ].update(shape=[24, 1 << 62]),
        lambda header: header.update({Q_PROJ: 3}),
    ],
    ids=["offsets", "negative offset", "dtype", "overflowing shape", "not an object"],
)
def test_a_damaged_header_is_refused(change, saved):
    header, data = header_of(saved / SINGLE)
    change(header)
    text = json.dumps(header).encode()
    (saved / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert_refused(saved, str(saved / SINGLE))


def test_a_header_that_claims_to_be_huge_is_refused(saved):
    (saved / SINGLE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert_refused(saved, str(saved / SINGLE))


def test_pickles_are_refused_with_the_remedy(saved):
    (saved / SINGLE).rename(saved / "pytorch_model.bin")
    assert_refused(saved, "pytorch_model.bin", "pickled", "save_pretrained")


def test_a_directory_without_weights_is_named(saved):
    (saved / SINGLE).unlink()
    assert_refused(saved, str(saved), SINGLE, INDEX)


@pytest.mark.parametrize(
    "file",
    [
        "../model-00001.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "evil.bin",
        3,
        "",
    ],
)
def test_an_index_may_name_files_of_its_directory_only(file, saved):
    index = shard(saved)
    index["weight_map"][Q_PROJ] = file
    (saved / INDEX).write_text(json.dumps(index))
    assert_refused(saved, INDEX, repr(file), str(saved))


def test_an_index_that_names_an_absent_file_is_refused(saved):
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    assert_refused(saved, "model-00002-of-00002.safetensors", "does not exist")


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused(saved):
    index = shard(saved)
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {index["weight_map"][Q_PROJ]}
    index["weight_map"][Q_PROJ] = other.pop()
    (saved / INDEX).write_text(json.dumps(index))
    assert_refused(saved, INDEX, Q_PROJ, index["weight_map"][Q_PROJ])


def test_an_index_that_omits_a_tensor_does_not_hide_it(saved):
    index = shard(saved)
    part = saved / index["weight_map"][Q_PROJ]
    safetensors.numpy.save_file(safetensors.numpy.load_file(part) | {"extra": np.ones(2, np.float32)}, part)
    assert_refused(saved, "extra")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_a_malformed_index_is_named(content, saved):
    shard(saved)
    (saved / INDEX).write_text(content)
    assert_refused(saved, str(saved / INDEX))
