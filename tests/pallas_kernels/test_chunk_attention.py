"""The promises of chunk attention alone: no cut of a prompt changes bits, and earlier rows never see later ones."""

import numpy as np
import pytest

from pallas_kernels.paged_attention import triton_chunk
from tests.pallas_kernels.attention_operations import CHUNK
from tests.pallas_kernels.cases import NUM_SLOTS, Case


def rows_of(case: Case, rows: np.ndarray, num_rows: int) -> Case:
    """Only these rows, in this order (-1: a row without a slot), and others without a slot up to `num_rows`."""
    rows = np.concatenate([rows, np.full(num_rows - len(rows), -1)]).astype(int)
    return case.replace(
        q=case.q[rows], slot=np.where(rows < 0, NUM_SLOTS, case.slot[rows]), position=case.position[rows]
    )


@pytest.mark.parametrize(
    ("operation", "backend", "name", "dtype"),
    CHUNK.with_backends(
        ("llama-135m", "bfloat16"),
        ("wide heads", "float32"),
        ("many heads", "float16"),
        ("long window", "bfloat16"),
        ("long window", "float8_e4m3fn"),
    ),
)
def test_a_rows_bits_do_not_depend_on_where_its_prompt_was_cut_nor_on_the_rows_beside_it(
    operation, backend, name, dtype
):
    case = operation.case(name, dtype, max_rows_per_slot=90)
    expected, num_rows = operation.run(backend, case), len(case.slot)
    runs = [np.flatnonzero(case.slot == slot) for slot in np.unique(case.slot[case.slot < NUM_SLOTS])]
    longest = max(runs, key=len)
    assert len(longest) > triton_chunk.block_rows(case.shape.group_size)
    pieces = [(longest[start : start + 64], 0) for start in range(0, len(longest), 64)]
    pieces += [(longest[start : start + 7], 3) for start in (1, len(longest) - 7)]
    pieces += [(longest[start : start + 1], 1) for start in (0, 31, 32, len(longest) - 1)]
    for rows, num_before in pieces:
        alone = rows_of(case, np.concatenate([np.full(num_before, -1), rows]), num_rows)
        np.testing.assert_array_equal(
            operation.run(backend, alone)[num_before : num_before + len(rows)], expected[rows]
        )
    shorter = [rows[-(1 + 9 * index) :] for index, rows in enumerate(runs)]
    for packed in (np.concatenate(runs[::-1]), np.concatenate(shorter)):
        np.testing.assert_array_equal(
            operation.run(backend, rows_of(case, packed, num_rows))[: len(packed)], expected[packed]
        )


@pytest.mark.parametrize("broken_number", [np.nan, np.inf])
@pytest.mark.parametrize(("operation", "backend", "name"), CHUNK.with_backends(("llama-135m",), ("long window",)))
def test_a_row_is_reached_by_what_it_sees_and_not_by_the_keys_and_values_of_later_rows(
    operation, backend, name, broken_number
):
    """One position is broken: rows before it, and rows whose window it left, keep their bits; the others show it."""
    case = operation.case(name, "bfloat16", max_rows_per_slot=90)
    rows, expected = np.flatnonzero(case.slot == 0), operation.run(backend, case)
    window, page_size = case.shape.window or 10**6, case.shape.page_size
    for broken_position in (70, 75, 300):
        if broken_position > case.position[rows].max():
            continue
        page, offset = case.page_ids[0, broken_position // page_size], broken_position % page_size
        broken = {"k": case.k.copy(), "v": case.v.copy()}
        for array in broken.values():
            array[page, :, offset, 3] = broken_number
        after = case.position[rows] - broken_position
        sees = (after >= 0) & (after < window)
        assert sees.any()
        assert not sees.all()
        for wrong in (broken, {"v": broken["v"]}):
            out = operation.run(backend, case.replace(**wrong))
            assert not np.isfinite(out[rows[sees]]).all(axis=2).any()
            np.testing.assert_array_equal(out[rows[~sees]], expected[rows[~sees]])


@pytest.mark.parametrize(("operation", "backend", "name"), CHUNK.with_backends(("llama-135m",)))
def test_the_last_block_may_reach_beyond_the_end_of_the_batch(operation, backend, name):
    """Other cases are padded, so that they share programs; a batch of an engine ends anywhere."""
    case = operation.case(name, "bfloat16")
    num_rows = int(np.sum(case.slot < NUM_SLOTS))  # the others come last
    num_last = int(np.sum(case.slot == case.slot[num_rows - 1]))
    assert num_last % triton_chunk.block_rows(case.shape.group_size)
    whole = case.replace(q=case.q[:num_rows], slot=case.slot[:num_rows], position=case.position[:num_rows])
    np.testing.assert_array_equal(operation.run(backend, whole), operation.run(backend, case)[:num_rows])


def test_a_block_has_128_queries_or_one_row_of_more():
    assert [triton_chunk.block_rows(group_size) for group_size in (1, 3, 4, 7, 64, 128, 140)] == [
        128,
        32,
        32,
        16,
        2,
        1,
        1,
    ]
