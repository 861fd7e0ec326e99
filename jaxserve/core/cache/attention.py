"""Attention over pages as a model sees it: write the tokens' keys and values, then attend over pages only."""

import enum
from typing import Any

from jaxtyping import Array, Float32, Int32

from jaxserve.models import Attend, Projection
from pallas_kernels import native
from pallas_kernels.paged_attention import PagedKV, chunk_attention, chunk_blocks, decode_attention
from pallas_kernels.rotary_write import rotary_write


class BatchLayout(enum.Enum):
    """The arrangement of a batch's rows, which decides the kernel."""

    SINGLE = "single"  # every batch row reads its slot's pages on its own, as in decoding; right for any batch
    CHUNKS = "chunks"  # the batch rows of a slot are adjacent and at consecutive positions, so they share their reads


def paged_attend(
    page_ids: Int32[Array, "S P"],
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    layout: BatchLayout,
    *,
    group_size: int,
    backend: str,
    interpret: bool = False,
    batch_size: Int32[Array, ""] | None = None,
) -> Attend:
    """Returns an `attend` for tokens of sequences in slots. Its `kv` is the pair of page arrays of one layer.

    The tokens of one slot may come in one call or in many: all keys and values of a call are written before any token
    attends, and a token attends to positions up to its own. Batch rows whose slot is "none" (S) write nothing.

    Args:
      page_ids: the page table.
      slot, position: slot and position of the token in each batch row.
      layout: the arrangement of the batch rows.
      group_size: query heads per kv head.
      backend, interpret: as in `pallas_kernels`. For "native" this is a `native.PagedBatch`, which packed parameters need.
      batch_size: how many batch rows count, from the first on; results of others may be undefined. None: all. Only
        "native" saves work by it.
    """
    if backend == "native":
        return native.PagedBatch(page_ids, slot, position, batch_size)
    run: dict[str, Any] = {"backend": backend, "interpret": interpret}
    blocks = None
    if layout is BatchLayout.CHUNKS:  # made once for all layers
        blocks = chunk_blocks(slot, position, num_slots=page_ids.shape[0], group_size=group_size, backend=backend)

    def attend(
        projection: Projection, kv: Any, *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], Any]:
        del layer
        k_pages, v_pages = kv
        pages = PagedKV(k_pages, v_pages, page_ids)
        qkv, cos, sin, q_norm, k_norm, norm_eps = projection
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
        q, k_pages, v_pages = rotary_write(qkv, cos, sin, pages, slot, position, **norms, **run)
        pages = pages._replace(k=k_pages, v=v_pages)
        if layout is BatchLayout.SINGLE:
            out = decode_attention(q, pages, slot, position, window=window, **run)
        else:
            out = chunk_attention(q, pages, slot, position, blocks=blocks, window=window, **run)
        return out, (k_pages, v_pages)

    return attend
