"""Attention of query rows to keys and values that lie in pages."""

from pallas_kernels.paged_attention.api import chunk_attention, chunk_blocks, decode_attention
from pallas_kernels.paged_attention.query_blocks import QueryBlocks
from pallas_kernels.pages import PagedKV

__all__ = ["PagedKV", "QueryBlocks", "chunk_attention", "chunk_blocks", "decode_attention"]
