"""Attention over pages. An argument chooses the backend; `reference.paged_attention` specifies what all of them compute."""

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import native
from pallas_kernels.backend import resolve_backend
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.query_blocks import QueryBlocks, query_blocks
from pallas_kernels.pages import PagedKV


def decode_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    num_splits: int | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Float32[Array, "B H D"]:
    """Computes attention for batch rows that each read the pages of their slot separately, as when every sequence decodes.

    Several batch rows of one slot are allowed. Given the shapes and `num_splits`, the bits of a batch row depend on its own
    sequence and position only.

    Args:
      q, kv, slot, position, window, softcap, sinks: as in `reference.paged_attention`.
      num_splits: into how many parts the positions of a batch row are split, to work on them in parallel (split-K,
        Flash-Decoding, Dao et al., 2023); None: chosen from the shapes. Only "triton" and "jax_triton" split.
      backend: "triton" (Pallas on NVIDIA GPUs), "jax_triton" (the same kernel through jax-triton), "tpu" (Pallas on TPUs),
        "native" (C++ on CPUs) or "reference" (plain JAX); None: the default of the platform.
      interpret: whether the kernel runs in Pallas' interpreter, on any device and slowly.

    Raises:
      ValueError: if the backend is unknown, or does not support the shapes, the dtype or `interpret`.
    """
    backend = backend_for(kv, q.shape[1] // kv.k.shape[1], backend)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    if backend == "native":
        return native.paged_attention(q, kv, slot, position, **options)
    if backend == "reference":
        return reference.paged_attention(q, kv, slot, position, **options)
    if backend == "tpu":
        from pallas_kernels.paged_attention import tpu

        return tpu.decode_attention(q, kv, slot, position, **options, interpret=interpret)
    if backend == "jax_triton":
        if interpret:
            raise ValueError("backend 'jax_triton' cannot be interpreted: interpret 'triton'")
        from pallas_kernels.paged_attention import jax_triton_decode

        return jax_triton_decode.decode_attention(q, kv, slot, position, **options, num_splits=num_splits)
    from pallas_kernels.paged_attention import triton_decode

    return triton_decode.decode_attention(q, kv, slot, position, **options, num_splits=num_splits, interpret=interpret)


def chunk_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    blocks: QueryBlocks | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Float32[Array, "B H D"]:
    """Computes attention for chunks: adjacent batch rows of one slot at consecutive positions read its pages together.

    Their own keys and values must be in the pages already. Chunks of several slots may be packed in one batch; the batch rows
    of each slot must be adjacent. The bits of a batch row depend neither on where its prompt was cut into chunks nor on the
    other batch rows.

    Args:
      q, kv, slot, position, window, softcap, sinks: as in `reference.paged_attention`.
      blocks: the result of `chunk_blocks`, to make it once for all layers; None: it is made here.
      backend: "triton", "tpu", "native" or "reference"; None: the default of the platform. "jax_triton" has no chunk kernel
        and runs "triton".
      interpret: whether the kernel runs in Pallas' interpreter, on any device and slowly.

    Raises:
      ValueError: if the backend is unknown, or does not support the shapes or the dtype.
    """
    backend = backend_for(kv, q.shape[1] // kv.k.shape[1], backend)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    if backend == "native":
        return native.paged_attention(q, kv, slot, position, **options)
    if backend == "reference":
        return reference.paged_attention(q, kv, slot, position, **options)
    if blocks is None:
        group_size = q.shape[1] // kv.k.shape[1]
        blocks = _blocks(slot, position, kv.num_slots, group_size, backend)
    if backend == "tpu":
        from pallas_kernels.paged_attention import tpu

        return tpu.chunk_attention(q, kv, blocks, **options, interpret=interpret)
    from pallas_kernels.paged_attention import triton_chunk

    return triton_chunk.chunk_attention(q, kv, blocks, **options, interpret=interpret)


def chunk_blocks(
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    num_slots: int,
    group_size: int,
    backend: str | None = None,
) -> QueryBlocks | None:
    """Returns the query blocks that `chunk_attention` works on with the same backend; None if that needs no blocks.

    Args:
      slot, position, backend: as in `chunk_attention`.
      num_slots: S.
      group_size: query heads per kv head.
    """
    backend = resolve_backend(backend)
    return None if backend in ("reference", "native") else _blocks(slot, position, num_slots, group_size, backend)


def backend_for(kv: PagedKV, group_size: int, backend: str | None) -> str:
    """Returns the backend by this name. None means the default of the platform if it serves these pages, else "reference".

    Raises:
      ValueError: if the backend is unknown, or is "native" and does not serve these pages.
    """
    resolved = resolve_backend(backend)
    if resolved != "native" or native.serves(kv, group_size):
        return resolved
    if backend is None:
        return "reference"
    raise ValueError(
        f"backend 'native' does not serve pages of {kv.k.dtype}{list(kv.k.shape)} with {group_size} query heads per kv head: "
        "it takes float32 and bfloat16 without scales, heads of up to 256 and 16 of them; use 'reference'"
    )


def _blocks(
    slot: Int32[Array, " B"], position: Int32[Array, " B"], num_slots: int, group_size: int, backend: str
) -> QueryBlocks:
    if backend == "tpu":
        from pallas_kernels.paged_attention import tpu

        block_rows = tpu.block_rows(group_size)
    else:
        from pallas_kernels.paged_attention import triton_chunk

        block_rows = triton_chunk.block_rows(group_size)
    return query_blocks(slot, position, num_slots=num_slots, block_rows=block_rows)
