"""Attention over pages as the model sees it: write the rows' keys and values, then attend over pages only."""

from typing import Any

from jaxtyping import Array, Float32, Int32

from jaxserve.cache.kv_pool import write_rows
from jaxserve.models import Attend
from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.reference import paged_attention


def paged_attend(page_ids: Int32[Array, "S P"], slot: Int32[Array, " B"], position: Int32[Array, " B"]) -> Attend:
    """An `attend` for rows that belong to slots; its `kv` is one layer's (k_pages, v_pages).

    Rows of one slot may come in one call or in many: every row is written before any attends, and attends to positions up
    to its own. Rows whose slot is "none" (S) write nothing.
    """

    def attend(
        q: Float32[Array, "B H D"],
        k: Float32[Array, "B K D"],
        v: Float32[Array, "B K D"],
        kv: Any,
        *,
        layer: int,
        window: int | None,
    ) -> tuple[Float32[Array, "B H D"], Any]:
        del layer
        k_pages, v_pages = kv
        num_pages, _, page_size, _ = k_pages.shape
        page = page_ids.at[slot, position // page_size].get(mode="fill", fill_value=num_pages)
        offset = position % page_size
        k_pages = write_rows(k_pages, k, page, offset)
        v_pages = write_rows(v_pages, v, page, offset)
        out = paged_attention(q, PagedKV(k_pages, v_pages, page_ids), slot, position, window=window)
        return out, (k_pages, v_pages)

    return attend
