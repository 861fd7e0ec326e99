"""The promises of decode attention alone: rows that are independent of each other, and any number of splits."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.paged_attention import decode_attention, triton_decode
from pallas_kernels.paged_attention.shapes import AttentionShape
from tests.pallas_kernels.attention_operations import DECODE, arguments_of
from tests.pallas_kernels.cases import NUM_SLOTS, assert_close

FEW_SHAPES = [("gemma2-2b",), ("gpt-oss-20b",), ("llama-135m",), ("small",), ("many heads",)]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "small"])
@pytest.mark.parametrize("num_splits", [1, 3, 16])
def test_any_number_of_splits_also_more_than_there_are_tiles(name, num_splits):
    case = DECODE.case(name, "float32")
    out = DECODE.run("triton", case, num_splits=num_splits)
    assert_close(out, case)
    np.testing.assert_array_equal(DECODE.run("triton", case.poisoned(), num_splits=num_splits), out)


@pytest.mark.parametrize(("operation", "backend", "name"), DECODE.with_backends(*FEW_SHAPES))
def test_a_rows_bits_do_not_depend_on_other_rows(operation, backend, name):
    case = operation.case(name, "bfloat16", seed=1)
    expected = operation.run(backend, case)
    for row in np.flatnonzero(case.slot < NUM_SLOTS):
        alone = np.where(np.arange(len(case.slot)) == row, case.slot, NUM_SLOTS)
        np.testing.assert_array_equal(operation.run(backend, case.replace(slot=alone))[row], expected[row])
        shorter = np.where(np.arange(len(case.slot)) == row, case.position, case.position // 3)
        np.testing.assert_array_equal(operation.run(backend, case.replace(position=shorter))[row], expected[row])


def test_splits_fill_the_gpu_and_are_no_more_than_the_longest_row_can_use():
    assert (
        triton_decode.default_num_splits(num_programs=16 * 8, max_tiles=1000) == 4
    )  # 396 programs fill it, 512 are made
    assert triton_decode.default_num_splits(num_programs=64 * 8, max_tiles=1000) == 1
    assert triton_decode.default_num_splits(num_programs=8, max_tiles=1000) == 64
    assert triton_decode.default_num_splits(num_programs=8, max_tiles=63) == 8  # 4 tiles each
    assert triton_decode.default_num_splits(num_programs=1, max_tiles=3) == 1
    assert triton_decode.default_num_splits(num_programs=1, max_tiles=10**6) == 128  # the most there are


@pytest.mark.parametrize(
    ("num_splits", "num_rows", "message"),
    [
        (0, 1, "num_splits 0 is not in 1..128"),
        (129, 1, "num_splits 129 is not in 1..128"),
        (None, 65536, "65536 batch rows are more than 65535"),
    ],
)
def test_splits_and_batches_that_a_grid_cannot_hold_are_refused(num_splits, num_rows, message):
    attend = functools.partial(decode_attention, backend="triton", num_splits=num_splits)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, *arguments_of(AttentionShape("", 4, 2, 64), num_rows=num_rows))
