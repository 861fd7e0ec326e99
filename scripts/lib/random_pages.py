"""Makes random keys and values in the format of a KV pool's pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pallas_kernels.pages import as_stored

STORED_STEP = {"int8": 1 / 30, "float8_e4m3fn": 1 / 16}  # approximate value of a stored 1; 1 for other dtypes
_PERIOD = 1_000_003  # draws that a pool repeats; prime, so that no two pages are equal


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_pages(key: jax.Array, shape: tuple[int, ...], dtype: str) -> Shaped[Array, "N K T D"]:
    """Draws normal numbers and stores them as `dtype`: a million draws, repeated until the shape is full."""
    size = int(np.prod(shape, dtype=np.int64))
    draws = jax.random.normal(key, (min(size, _PERIOD),)) / STORED_STEP.get(dtype, 1.0)
    return jnp.tile(as_stored(draws, jnp.dtype(dtype)), -(-size // draws.size))[:size].reshape(shape)
