"""The KV pool: per layer one array of keys and one of values, written in place.

The layout is [pages, kv heads, page size, head dim]: a page of one head is contiguous, and kv heads can be sharded. An array
holds one layer, so that a write touches the buffer of that layer only.

On CPU a bfloat16 pool is stored as the bits of its numbers (uint16), because XLA:CPU scatters into a bfloat16 array by
converting all of it to float32 and back.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.models import ModelConfig

_MAX_ELEMENTS = 2**31  # offsets in kernels are int32

T = TypeVar("T")


@record
class KVPool(Record):
    """Keys and values of all pages: L pairs of arrays."""

    k: tuple[Shaped[Array, "N K T D"], ...]  # per layer; float, or uint16 holding bfloat16 bits
    v: tuple[Shaped[Array, "N K T D"], ...]  # same shape and dtype as k


def init_kv_pool(model: ModelConfig, num_pages: int, page_size: int, dtype: str, *, as_bits: bool) -> KVPool:
    """Returns a pool of zeros.

    Args:
      model: static; gives layers, kv heads and head dim.
      num_pages: N.
      page_size: T, tokens per page.
      dtype: "float32", "float16" or "bfloat16".
      as_bits: whether bfloat16 is stored as uint16 (see the module's note); other dtypes are not affected.

    Raises:
      ValueError: if one array would hold more than 2^31 elements.
    """
    shape = (num_pages, model.num_kv_heads, page_size, model.head_dim)
    num_elements = num_pages * model.num_kv_heads * page_size * model.head_dim
    if num_elements > _MAX_ELEMENTS:
        raise ValueError(
            f"num_pages={num_pages} gives {num_elements} elements per layer, above the 2^31 that 32-bit offsets "
            f"reach: use at most {_MAX_ELEMENTS * num_pages // num_elements} pages"
        )
    stored = jnp.uint16 if as_bits and dtype == "bfloat16" else jnp.dtype(dtype)

    def pages() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, stored) for _ in range(model.num_layers))

    return KVPool(k=pages(), v=pages())


def copy_pages(pages: T, source: Int32[Array, " S"], target: Int32[Array, " S"]) -> T:
    """Copies whole pages; all are read before the first is written. Costs nothing when there is none to copy.

    Args:
      pages: arrays [N, ...], or a tree of them: a `KVPool`.
      source: pages to copy.
      target: for each of them the page to overwrite, no two the same; N = none, this page is not copied.
    """
    (num_pages,) = {leaf.shape[0] for leaf in jax.tree.leaves(pages)}

    def copy(pages: T) -> T:
        def one(array: Array) -> Array:
            return array.at[target].set(array.at[source].get(mode="clip"), mode="drop")

        return jax.tree.map(one, pages)

    return if_any(target < num_pages, copy, pages)


def bytes_per_page(model: ModelConfig, page_size: int, dtype: str) -> int:
    """Returns the bytes of one page over all layers, keys and values together."""
    itemsize = jnp.dtype(dtype).itemsize
    return 2 * model.num_layers * model.num_kv_heads * page_size * model.head_dim * itemsize


def stores_bits(backend: str, platform: str | None = None) -> bool:
    """Returns whether a bfloat16 pool is stored as bits: on a CPU, with a backend that XLA or native code serves.

    Args:
      backend: the backend that writes to pages.
      platform: platform of the devices that hold the pool; None: that of JAX's default device.
    """
    return (platform or jax.default_backend()) == "cpu" and backend in ("reference", "native")
