"""From the fused projection to rotated queries, with keys and values written to their pages."""

from pallas_kernels.rotary_write.api import rotary_write

__all__ = ["rotary_write"]
