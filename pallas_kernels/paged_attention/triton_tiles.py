"""The parts that the decode and the chunk kernel share: tiles read through a page table, and softmax folded tile by tile.

These functions run inside Pallas kernels that lower to Triton. There sizes are powers of two, both operands of a product have
at least 16 rows, and a masked load names the value of elements that it does not read. A tile is a fixed number of positions
that starts at an absolute multiple of that number. It is a part of one page, or it covers several pages:

    page size 16, tile 64:  page ids of a tile [7 7 .. 7 2 2 .. 2 9 9 .. 9 4 4 .. 4]   one per position
    page size 128, tile 64: page id of a tile  7                                       a scalar

Scores are in base 2: log2(e) is folded into the queries, and exp2 takes the place of exp.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention.limits import check_shapes
from pallas_kernels.pages import PagedKV

LOG2_E = math.log2(math.e)
MIN_ROWS = 16  # fewest rows of an operand of a product
_MAX_POOL_ELEMENTS = 2**31  # Pallas counts in int32, which overflows without an error for 1-byte arrays of 2 to 4 GiB
_COMPUTE_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "uint16": jnp.bfloat16,
    "float8_e4m3fn": jnp.float16,  # holds every 8-bit number exactly
    "float8_e5m2": jnp.float16,
    "int8": jnp.float16,
}


def compute_dtype(pages_dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that queries, keys and weights are rounded to for their products, given the dtype of the pages.

    Raises:
      ValueError: if kernels do not support pages of this dtype.
    """
    name = jnp.dtype(pages_dtype).name
    if name not in _COMPUTE_DTYPES:
        raise ValueError(f"pages of {name} are not supported: use one of {', '.join(_COMPUTE_DTYPES)}")
    return jnp.dtype(_COMPUTE_DTYPES[name])


def check_supported(q: Float[Array, "B H D"], kv: PagedKV) -> None:
    """Refuses shapes and dtypes that the kernels for GPUs do not support.

    Raises:
      ValueError: naming the value, the rule and the remedy.
    """
    check_shapes(q, kv)
    compute_dtype(kv.k.dtype)
    if kv.k.size > _MAX_POOL_ELEMENTS:
        raise ValueError(f"a pool array of {kv.k.size} elements exceeds {_MAX_POOL_ELEMENTS}: use fewer pages")
    if kv.k.dtype == jnp.float8_e4m3fn:
        check_converts_e4m3()


def check_converts_e4m3() -> None:
    """Refuses float8_e4m3fn on GPUs that cannot convert it: there Triton would end the whole process.

    Raises:
      ValueError: naming the compute capability and the dtypes to use instead.
    """
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and tuple(map(int, capability.split("."))) < (8, 9):
        raise ValueError(
            f"pages of float8_e4m3fn need an NVIDIA GPU of compute capability 8.9 or more, this one has {capability}: "
            "use float8_e5m2 or int8"
        )


def kernel_pages(pages: Shaped[Array, "N K T D"]) -> Shaped[Array, "N K T D"]:
    """Returns pages as kernels read them: uint16, the bits of bfloat16, becomes bfloat16."""
    return lax.bitcast_convert_type(pages, jnp.bfloat16) if pages.dtype == jnp.uint16 else pages


def padded(size: int, at_least: int = MIN_ROWS) -> int:
    """Returns the power of two that a size is padded to."""
    return max(at_least, 1 << (size - 1).bit_length())


def query_factor(softcap: float | None) -> float:
    """Returns the factor of queries that `scores` expects. It is applied in float32, before they are rounded."""
    return LOG2_E if softcap is None else 2 * LOG2_E / softcap


def tile_positions(tile: Int32[Array, ""], tile_size: int) -> Int32[Array, " tile"]:
    """Returns the positions in the sequence that a tile covers."""
    return tile * tile_size + jnp.arange(tile_size, dtype=jnp.int32)


def load_page_ids(
    page_ids_ref: jax.Ref,
    slot: Int32[Array, ""],
    tile: Int32[Array, ""],
    last: Int32[Array, ""],
    *,
    tile_size: int,
    page_size: int,
) -> Int32[Array, "*tile"]:
    """Returns the page of each position of a tile, or one scalar if all lie in one page.

    Behind position `last`, where nothing is read, the page is 0. Load the ids one tile ahead and carry them through the loop.
    If they are loaded where they are needed, they take the stages of the pipeline, and keys and values get a single buffer.
    """
    positions = tile * tile_size if page_size >= tile_size else tile_positions(tile, tile_size)
    return plgpu.load(
        page_ids_ref.at[slot, lax.div(positions, np.int32(page_size))], mask=positions <= last, other=np.int32(0)
    )


def load_tile(
    pages_ref: jax.Ref,
    page_ids: Int32[Array, "*tile"],
    kv_head: Int32[Array, ""],
    positions: Int32[Array, " tile"],
    is_read: Bool[Array, " tile"] | None,
) -> Float[Array, "tile padded_D"]:
    """Returns keys or values of one head at the positions of a tile, ready for a product.

    Where `is_read` is False nothing is read and the result is 0, because a weight of 0 times NaN would be NaN. None: all
    positions are read.
    """
    page_size, head_dim = pages_ref.shape[2:]
    dim = jnp.arange(padded(head_dim), dtype=jnp.int32)
    mask = None if is_read is None else is_read[:, None]
    if padded(head_dim) != head_dim:
        inside = (dim < head_dim)[None, :]
        mask = inside if mask is None else mask & inside
    if page_ids.ndim:
        page_ids = page_ids[:, None]
    offset = lax.rem(positions, np.int32(page_size))[:, None]
    other = None if mask is None else np.zeros((), pages_ref.dtype)
    values = plgpu.load(pages_ref.at[page_ids, kv_head, offset, dim[None, :]], mask=mask, other=other)
    return values.astype(compute_dtype(pages_ref.dtype))


def scores(
    q: Float[Array, "rows padded_D"],
    k: Float[Array, "tile padded_D"],
    visible: Bool[Array, "rows_or_1 tile"] | None,
    *,
    k_scale: Float32[Array, ""] | None = None,
    softcap: float | None = None,
) -> Float32[Array, "rows tile"]:
    """Returns scores in base 2 of queries that were multiplied by `query_factor`; -inf where `visible` (None: all) is False."""
    out = _product(q, k, contract=(1, 1))
    if k_scale is not None:
        out = out * k_scale
    if softcap is not None:  # tanh(x) = 1 - 2 / (exp(2 x) + 1); query_factor makes exp2(out) that exp(2 x)
        bound = np.float32(softcap * LOG2_E)
        out = bound - (2 * bound) / (jnp.exp2(out) + 1)
    return out if visible is None else jnp.where(visible, out, -jnp.inf)


class Softmax(NamedTuple):
    """A running softmax (Milakov and Gimelshein, 2018), in float32; `total` and `out` are relative to 2^largest."""

    largest: Float32[Array, " rows"]  # largest score; -inf: none yet
    total: Float32[Array, " rows"]  # sum of weights
    out: Float32[Array, "rows padded_D"]  # weighted sum of values


def empty_softmax(rows: int, head_dim: int) -> Softmax:
    """Returns the softmax of no position at all."""
    zeros = jnp.zeros(rows, jnp.float32)
    return Softmax(jnp.full(rows, -jnp.inf, jnp.float32), zeros, jnp.zeros((rows, padded(head_dim)), jnp.float32))


def fold(softmax: Softmax, tile_scores: Float32[Array, "rows tile"], v: Float[Array, "tile padded_D"]) -> Softmax:
    """Adds a tile. A tile that a row does not see changes none of its bits: it adds 0 and corrects by 2^0 = 1."""
    largest = jnp.maximum(softmax.largest, jnp.max(tile_scores, axis=1))
    base = finite_base(largest)
    weights = jnp.exp2(tile_scores - base[:, None])
    correction = jnp.exp2(softmax.largest - base)
    return Softmax(
        largest=largest,
        total=softmax.total * correction + jnp.sum(weights, axis=1),
        out=softmax.out * correction[:, None] + _product(weights.astype(v.dtype), v, contract=(1, 0)),
    )


def finish(
    softmax: Softmax, sink: Float32[Array, " rows"] | None = None, v_scale: Float32[Array, ""] | None = None
) -> Float32[Array, "rows padded_D"]:
    """Returns the attention output; 0 for rows that saw nothing. Sinks are in base e, as users give them."""
    total, out = softmax.total, softmax.out
    if sink is not None:
        sink = sink * LOG2_E
        base = finite_base(jnp.maximum(softmax.largest, sink))
        correction = jnp.exp2(softmax.largest - base)
        total = total * correction + jnp.exp2(sink - base)
        out = out * correction[:, None]
    if v_scale is not None:
        out = out * v_scale
    return jnp.where(total[:, None] == 0, 0, out / total[:, None])


def finite_base(largest: Float32[Array, " rows"]) -> Float32[Array, " rows"]:
    """Returns the number to subtract from exponents. Without scores it is 0, because -inf - -inf would be NaN."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def triton_call(
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    name: str,
    interpret: bool,
) -> Callable[..., Any]:
    """Returns a Pallas kernel as a function. Arguments reach it as references to whole arrays, which on a GPU are pointers.

    The first dimension of the grid changes fastest; the others have at most 65535 programs. Compiler parameters are always
    passed, because versions of JAX differ in what they lower to without them.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )


def _product(a: Array, b: Array, *, contract: tuple[int, int]) -> Float32[Array, "m n"]:
    """Multiplies with a float32 accumulator; float32 operands are not rounded to fewer bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
