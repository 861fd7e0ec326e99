"""Calls of the library's kernels from Python, and the operands that stand for "all" and "none"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.native import library


def kernel(name: str, results: Any, **options: Any) -> Callable[..., Any]:
    """Returns the kernel `name` as a function of arrays, and loads the library first if that has not happened yet.

    Args:
      name: one of `library.TARGETS`.
      results: shapes and dtypes of what the kernel returns.
      **options: options of `jax.ffi.ffi_call`.

    Raises:
      ValueError: if the library cannot be built or loaded here; the message says why.
    """
    if (reason := library.why_not()) is not None:
        raise ValueError(f"the native kernels cannot run here: {reason}; or use the backend 'reference'")
    return jax.ffi.ffi_call(name, results, **options)


def size_or_all(batch_size: Int32[Array, ""] | None, num_rows: int) -> Int32[Array, ""]:
    """Returns `batch_size`, or the number of all batch rows if it is None."""
    return jnp.asarray(num_rows, jnp.int32) if batch_size is None else batch_size


def vector_or_empty(vector: Any) -> Float32[Array, " _"]:
    """Returns the elements of an array as float32. An empty vector tells a kernel that there is no such operand."""
    return jnp.zeros((0,), jnp.float32) if vector is None else vector.astype(jnp.float32).reshape(-1)
