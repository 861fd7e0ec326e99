"""Products with packed weights, and the lookup of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Num

from pallas_kernels.native.call import kernel, size_or_all, vector_or_empty


def embed(
    w: Num[Array, "..."], ids: Int32[Array, " B"], size: int, batch_size: Int32[Array, ""] | None = None
) -> Float32[Array, "B K"]:
    """Returns rows `ids` of a table [V, K], or the same numbers from the packed weight made of the table's transpose.

    It is a kernel because XLA:CPU copies a whole bfloat16 array to gather from it.

    Args:
      w: the table or packed weight.
      ids: in [0, V). The result of another id is meaningless, but nothing outside of the table is read.
      size: K.
      batch_size: the first so many ids are looked up; None: all.
    """
    call = kernel("jaxserve_embed", jax.ShapeDtypeStruct((ids.shape[0], size), jnp.float32))
    return call(w, ids, size_or_all(batch_size, ids.shape[0]))


def product(
    x: Float32[Array, "B K"],
    w: Num[Array, "N/64 K/2 _ _"],
    *,
    num_columns: int,
    batch_size: Int32[Array, ""] | None = None,
    scale: Float32[Array, " K"] | None = None,
    eps: float = 1e-6,
    bias: Float32[Array, " N"] | None = None,
    residual: Float32[Array, "B N"] | None = None,
    gated: bool = False,
) -> Float32[Array, "B N"]:
    """Returns residual + act(norm(x) @ w + bias), accumulated in float32.

    Both operands have the weight's dtype; with int8 weights they are bfloat16. The bits of a batch row depend on that row
    only. With AVX-512 BF16, bfloat16 and int8 weights are multiplied by vdpbf16ps, which takes subnormal numbers for zero.

    Args:
      x: one row of numbers per batch row.
      w: from `pack` or `pack_int8`; if gated, from `pack_gated` or `pack_int8_gated`.
      num_columns: N, or F if gated.
      batch_size: batch rows to compute; None: all.
      scale: scale of an RMSNorm that is applied to x; None: no norm.
      eps: number that the RMSNorm adds to the mean square.
      bias: added to the product, [2F] if gated; None: no bias.
      residual: added last; None: no residual.
      gated: SwiGLU: silu of the gate's columns times the other columns, instead of all columns.
    """
    call = kernel("jaxserve_product", jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32))
    if residual is None:
        residual = jnp.zeros((0, 0), jnp.float32)
    size = size_or_all(batch_size, x.shape[0])
    vectors = vector_or_empty(scale), vector_or_empty(bias)
    return call(x, w, size, *vectors, residual, eps=np.float32(eps), gated=gated)
