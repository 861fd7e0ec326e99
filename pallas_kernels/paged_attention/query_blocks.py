"""Query blocks: runs of batch rows of one sequence that a chunk kernel works on together.

slot     = [2 2 2 2 2 0 0 0 3 - - -]      "-" means no slot
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
    """X blocks, of which those in use come first. They are the same for all layers, so they are made once per batch."""

    first_row: Int32[Array, " X"]  # batch row; B if the block is not in use
    num_rows: Int32[Array, " X"]  # adjacent batch rows at consecutive positions; 0: not in use
    slot: Int32[Array, " X"]  # S: no slot, so that the result of the batch rows is 0
    first_position: Int32[Array, " X"]  # position of first_row in its sequence


def query_blocks(
    slot: Int32[Array, " B"], position: Int32[Array, " B"], *, num_slots: int, block_rows: int
) -> QueryBlocks:
    """Cuts a batch into blocks of at most `block_rows` batch rows, each of one slot and at consecutive positions.

    There is just enough room for any batch in which the batch rows of each slot are adjacent, and those without a slot too. In
    a batch that is cut up further, blocks are short, and batch rows may be lost.

    Args:
      slot: slot of each batch row; S: no slot, and then the position means nothing.
      position: position of each batch row.
      num_slots: S.
      block_rows: the most batch rows per block.
    """
    (num_rows,) = slot.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)
    follows = (slot == jnp.roll(slot, 1)) & ((position == jnp.roll(position, 1) + 1) | (slot >= num_slots)) & (row > 0)
    run_start = lax.cummax(jnp.where(follows, 0, row))
    starts = lax.rem(row - run_start, jnp.int32(block_rows)) == 0
    max_runs = min(num_slots + 1, num_rows)
    size = max_runs + (num_rows - max_runs) // block_rows  # if all runs but one have a single batch row
    (first_row,) = jnp.nonzero(starts, size=size, fill_value=num_rows)
    first_row = first_row.astype(jnp.int32)
    end = jnp.append(first_row[1:], jnp.int32(num_rows))
    return QueryBlocks(
        first_row=first_row,
        num_rows=end - first_row,
        slot=slot.at[first_row].get(mode="fill", fill_value=num_slots),
        first_position=position.at[first_row].get(mode="fill", fill_value=0),
    )
