"""Attention of query rows to keys and values that lie in pages."""

from pallas_kernels.paged_attention.reference import paged_attention

__all__ = ["paged_attention"]
