"""Copies of pages within the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.cache import KVPool, copy_pages

NUM_PAGES = 5
NONE = NUM_PAGES


def pool_of(dtype: jnp.dtype, num_layers: int = 2) -> KVPool:
    """Returns a pool in which no two numbers are the same."""
    shape = (NUM_PAGES, 2, 3, 4)
    arrays = [(jnp.arange(120) + 120 * index).reshape(shape).astype(dtype) for index in range(2 * num_layers)]
    return KVPool(k=tuple(arrays[::2]), v=tuple(arrays[1::2]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16], ids=str)
@pytest.mark.parametrize(
    "source, target, result",
    [
        ([1, NONE, NONE], [3, NONE, NONE], [0, 1, 2, 1, 4]),
        ([1, 1, 1], [3, 0, 4], [1, 1, 2, 1, 1]),
        # A page is read before it is written, whatever the order.
        ([1, 3, 0], [3, 0, NONE], [3, 1, 2, 1, 4]),
        ([4, 0, NONE], [0, 4, NONE], [4, 1, 2, 3, 0]),
        # What has no target is not copied, nor the page that "none" would be clipped to.
        ([1, 4, 2], [NONE, NONE, NONE], [0, 1, 2, 3, 4]),
        ([NONE, 2, NONE], [NONE, 4, NONE], [0, 1, 2, 3, 2]),
    ],
)
def test_pages_are_copied_whole_in_all_layers(dtype, source, target, result):
    pool = pool_of(dtype)
    copied = jax.jit(copy_pages)(pool, jnp.array(source, jnp.int32), jnp.array(target, jnp.int32))
    for before, after in zip(jax.tree.leaves(pool), jax.tree.leaves(copied), strict=True):
        np.testing.assert_array_equal(after, before[jnp.array(result)])
