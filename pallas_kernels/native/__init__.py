"""C++ kernels for CPUs, as functions of JAX arrays: one Python module and one C++ source file per operation.

Shapes, meanings and results are those of the plain JAX functions that the docstrings name. All functions run on CPUs only and
have no derivatives. Where a function takes `batch_size`, only the first `batch_size` batch rows are computed: the others cost
nothing and their results are undefined.
"""

from pallas_kernels.native.attention import paged_attention, rotary_write, serves, serves_heads
from pallas_kernels.native.blocks import BlockWeights, PagedBatch, blocks
from pallas_kernels.native.packing import pack, pack_gated, pack_int8, pack_int8_gated, quantize
from pallas_kernels.native.product import embed, product
from pallas_kernels.native.sampling import choose, report

__all__ = [
    "BlockWeights",
    "PagedBatch",
    "blocks",
    "choose",
    "embed",
    "pack",
    "pack_gated",
    "pack_int8",
    "pack_int8_gated",
    "paged_attention",
    "product",
    "quantize",
    "report",
    "rotary_write",
    "serves",
    "serves_heads",
]
