"""Query blocks: runs of rows of one sequence that a chunk kernel works on together.

slot     = [2 2 2 2 2 0 0 0 3 - - -]      "-" is none
position = [5 6 7 8 9 0 1 2 7 . . .]
blocks of at most 4 rows:  first_row      = [0 4 5 8 9 ...]
                           num_rows       = [4 1 3 1 3 ...]   0 for blocks not in use
                           slot           = [2 2 0 3 - ...]
                           first_position = [5 9 0 7 . ...]
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


class QueryBlocks(NamedTuple):
    """X blocks; those in use come first. The same for all layers, so it is made once per batch."""

    first_row: Int32[Array, " X"]  # in the batch; B if not in use
    num_rows: Int32[Array, " X"]  # adjacent rows, their positions consecutive; 0: not in use
    slot: Int32[Array, " X"]  # S = none: the rows' result is 0
    first_position: Int32[Array, " X"]  # of first_row, in its sequence


def query_blocks(
    slot: Int32[Array, " B"], position: Int32[Array, " B"], *, num_slots: int, block_rows: int
) -> QueryBlocks:
    """Cuts a batch into blocks of at most `block_rows` rows, each of one slot and of consecutive positions.

    Args:
      slot: slot of each row; S = none, for which positions mean nothing.
      position: position of each row.
      num_slots: S.
      block_rows: most rows per block.

    Rows of one slot need not be adjacent, but where they are not, blocks are short. There is room, and no more, for every case
    in which each slot's rows form one run, and so do the rows without a slot; of a batch cut up further, rows may be lost.
    """
    (num_rows,) = slot.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)
    follows = (slot == jnp.roll(slot, 1)) & ((position == jnp.roll(position, 1) + 1) | (slot >= num_slots)) & (row > 0)
    run_start = lax.cummax(jnp.where(follows, 0, row))
    starts = lax.rem(row - run_start, jnp.int32(block_rows)) == 0
    max_runs = min(num_slots + 1, num_rows)
    size = max_runs + (num_rows - max_runs) // block_rows  # all runs of one row, but for one of all the others
    (first_row,) = jnp.nonzero(starts, size=size, fill_value=num_rows)
    first_row = first_row.astype(jnp.int32)
    end = jnp.append(first_row[1:], jnp.int32(num_rows))
    return QueryBlocks(
        first_row=first_row,
        num_rows=end - first_row,
        slot=slot.at[first_row].get(mode="fill", fill_value=num_slots),
        first_position=position.at[first_row].get(mode="fill", fill_value=0),
    )
