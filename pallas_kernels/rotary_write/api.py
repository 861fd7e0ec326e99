"""Rotary embedding and the write of keys and values to pages. An argument chooses the backend."""

from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import native
from pallas_kernels.paged_attention.api import backend_for
from pallas_kernels.pages import PagedKV
from pallas_kernels.rotary_write import reference


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
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, "B H D"], Shaped[Array, "N K T D"], Shaped[Array, "N K T D"]]:
    """Returns queries ready for attention, and the pages with the new keys and values in them.

    Args:
      qkv, cos, sin, kv, slot, position, q_norm, k_norm, norm_eps: as in `reference.rotary_write`, which specifies the
        result. The page arrays are written in place if the caller does not use them afterwards.
      backend: "triton" (Pallas on NVIDIA GPUs), "native" (C++ on CPUs) or "reference" (plain JAX); None: the default of the
        platform. "tpu" runs the reference, whose scatter XLA compiles, and "jax_triton" runs "triton".
      interpret: whether the kernel runs in Pallas' interpreter, on any device and slowly.

    Raises:
      ValueError: if the backend is unknown, or does not support the shapes or the dtype.
    """
    backend = backend_for(kv, qkv.shape[2] - 2, backend)
    norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
    if backend == "native":
        return native.rotary_write(qkv, cos, sin, kv, slot, position, **norms)
    if backend in ("reference", "tpu"):
        return reference.rotary_write(qkv, cos, sin, kv, slot, position, **norms)
    from pallas_kernels.rotary_write import triton

    return triton.rotary_write(qkv, cos, sin, kv, slot, position, **norms, interpret=interpret)
