"""Query blocks against a plain-Python oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.query_blocks import query_blocks

MAKE = jax.jit(query_blocks, static_argnames=("num_slots", "block_rows"))


def make(slot, position, *, num_slots: int, block_rows: int) -> list[np.ndarray]:
    blocks = MAKE(jnp.asarray(slot), jnp.asarray(position), num_slots=num_slots, block_rows=block_rows)
    assert all(array.dtype == jnp.int32 for array in blocks)
    return [np.asarray(array) for array in blocks]


def oracle(slot, position, *, num_slots: int, block_rows: int) -> list[tuple[int, int, int, int]]:
    """(first_row, num_rows, slot, first_position) of the blocks in use, one row after the other."""
    blocks: list[tuple[int, int, int, int]] = []
    for row, (its_slot, its_position) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        if blocks:
            first_row, num_rows, block_slot, first_position = blocks[-1]
            is_next = its_slot == num_slots or its_position == first_position + num_rows
            if its_slot == block_slot and is_next and num_rows < block_rows:
                blocks[-1] = first_row, num_rows + 1, block_slot, first_position
                continue
        blocks.append((row, 1, its_slot, its_position))
    return blocks


def random_batch(rng: np.random.Generator, num_rows: int, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of distinct slots in any order, at times two of one slot's, and rows without a slot before, between or after."""
    slot, position = np.full(num_rows, num_slots, np.int32), rng.integers(0, 10**6, num_rows).astype(np.int32)
    row = int(rng.integers(0, 3))
    for run_slot in rng.permutation(num_slots)[: rng.integers(0, num_slots)].repeat(rng.integers(1, 3)):
        length = int(min(rng.integers(1, 2 * num_rows // num_slots + 2), num_rows - row))
        slot[row : row + length] = run_slot
        position[row : row + length] = rng.integers(0, 1000) + np.arange(length)
        row += length + int(rng.integers(0, 4)) * int(rng.integers(0, 2))
        if row >= num_rows:
            break
    return slot, position


@pytest.mark.parametrize(("num_rows", "num_slots", "block_rows"), [(1, 1, 4), (40, 9, 1), (64, 30, 4), (200, 7, 32)])
def test_blocks_are_those_of_the_oracle_and_come_first(num_rows, num_slots, block_rows):
    rng = np.random.default_rng(0)
    sizes = {"num_slots": num_slots, "block_rows": block_rows}
    num_checked = 0
    for _ in range(100):
        slot, position = random_batch(rng, num_rows, num_slots)
        expected = oracle(slot, position, **sizes)
        first_row, *rest = make(slot, position, **sizes)
        if len(expected) > len(first_row):
            continue  # cut up further than there is room for
        used = len(expected)
        num_checked += 1
        assert list(zip(first_row[:used].tolist(), *(array[:used].tolist() for array in rest), strict=True)) == expected
        block_num_rows, block_slot, _ = rest
        assert (first_row[used:] == num_rows).all()
        assert not block_num_rows[used:].any()
        assert (block_slot[used:] == num_slots).all()
    assert num_checked > 50


@pytest.mark.parametrize(
    ("num_rows", "num_slots", "block_rows"), [(1, 5, 4), (6, 5, 4), (50, 3, 8), (51, 3, 8), (9, 20, 1)]
)
def test_there_is_room_for_as_many_runs_as_there_can_be_and_no_more(num_rows, num_slots, block_rows):
    """The most blocks: a row of each slot but one, a row without a slot, and the rest of the batch of the last slot."""
    num_runs = min(num_slots + 1, num_rows)
    slot = np.minimum(np.arange(num_rows), num_runs - 1).astype(np.int32)
    slot = np.where(slot == 0, num_slots, slot - 1).astype(np.int32)
    position = np.arange(num_rows, dtype=np.int32)
    first_row, block_num_rows, _, _ = make(slot, position, num_slots=num_slots, block_rows=block_rows)
    assert block_num_rows.all()
    assert block_num_rows.sum() == num_rows
    assert len(first_row) == len(oracle(slot, position, num_slots=num_slots, block_rows=block_rows))


def test_the_example_of_the_documentation():
    slot = np.array([2, 2, 2, 2, 2, 0, 0, 0, 3, 4, 4, 4], np.int32)
    position = np.array([5, 6, 7, 8, 9, 0, 1, 2, 7, 9, 9, 9], np.int32)
    first_row, num_rows, block_slot, first_position = make(slot, position, num_slots=4, block_rows=4)
    assert first_row.tolist() == [0, 4, 5, 8, 9, 12]
    assert num_rows.tolist() == [4, 1, 3, 1, 3, 0]
    assert block_slot.tolist() == [2, 2, 0, 3, 4, 4]
    assert first_position[:4].tolist() == [5, 9, 0, 7]


def test_neighbours_of_one_slot_whose_positions_do_not_follow_part():
    sizes = {"num_slots": 1, "block_rows": 8}
    first_row, num_rows, _, first_position = make(np.zeros(4, np.int32), np.array([3, 4, 4, 5], np.int32), **sizes)
    assert (first_row.tolist(), num_rows.tolist(), first_position.tolist()) == ([0, 2], [2, 2], [3, 4])
