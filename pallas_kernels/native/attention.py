"""Attention over pages, and rotary embedding with the write to pages."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.native.call import kernel, size_or_all, vector_or_empty
from pallas_kernels.pages import PagedKV

_MAX_HEAD_DIM = 256
_MAX_GROUP_SIZE = 16


def serves(kv: PagedKV, group_size: int) -> bool:
    """Returns whether attention over these pages can run natively: they must be float32 or bfloat16, without scales."""
    return (
        kv.k.dtype in (jnp.float32, jnp.bfloat16, jnp.uint16)
        and kv.k_scale is None
        and kv.v_scale is None
        and serves_heads(kv.k.shape[3], group_size)
    )


def serves_heads(head_dim: int, group_size: int) -> bool:
    """Returns whether attention can run natively for heads of this size, with `group_size` query heads per kv head."""
    return head_dim % 2 == 0 and head_dim <= _MAX_HEAD_DIM and group_size <= _MAX_GROUP_SIZE


def rotary_write(
    qkv: Float32[Array, "B K G+2 D"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    norm_eps: float = 1e-6,
    batch_size: Int32[Array, ""] | None = None,
) -> tuple[Float32[Array, "B H D"], Shaped[Array, "N K T D"], Shaped[Array, "N K T D"]]:
    """Computes `rotary_write.reference.rotary_write` in one pass, and writes the pages in place."""
    num_heads = qkv.shape[1] * (qkv.shape[2] - 2)
    results = (
        jax.ShapeDtypeStruct((qkv.shape[0], num_heads, qkv.shape[3]), jnp.float32),
        jax.ShapeDtypeStruct(kv.k.shape, kv.k.dtype),
        jax.ShapeDtypeStruct(kv.v.shape, kv.v.dtype),
    )
    call = kernel("jaxserve_rotary_write", results, input_output_aliases={3: 1, 4: 2})
    size = size_or_all(batch_size, qkv.shape[0])
    norms = vector_or_empty(q_norm), vector_or_empty(k_norm)
    q, k, v = call(qkv, cos, sin, kv.k, kv.v, kv.page_ids, slot, position, size, *norms, eps=np.float32(norm_eps))
    return q, k, v


def paged_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    batch_size: Int32[Array, ""] | None = None,
) -> Float32[Array, "B H D"]:
    """Computes `paged_attention.reference.paged_attention`; adjacent batch rows of one slot read its pages together."""
    call = kernel("jaxserve_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    size = size_or_all(batch_size, q.shape[0])
    options = {"window": np.int64(window or 0), "softcap": np.float32(softcap or 0)}
    sinks = vector_or_empty(sinks)
    return call(q.astype(jnp.float32), kv.k, kv.v, kv.page_ids, slot, position, size, sinks, **options)
