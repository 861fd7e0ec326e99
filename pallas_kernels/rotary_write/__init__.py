"""Rotary embedding of the fused projection: rotated queries, and keys and values written to their pages."""

from pallas_kernels.rotary_write.api import rotary_write

__all__ = ["rotary_write"]
