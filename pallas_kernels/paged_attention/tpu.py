"""Attention over pages for TPUs (Pallas, Mosaic)."""

from pallas_kernels.paged_attention.tpu_chunk import block_rows, chunk_attention
from pallas_kernels.paged_attention.tpu_decode import decode_attention

__all__ = ["block_rows", "chunk_attention", "decode_attention"]
