"""Rotary embedding and the write to pages as one Pallas kernel for NVIDIA GPUs, lowered by Triton.

A program works on a few batch rows and one kv head: the queries of its group, its key and its value. Triton can neither slice
nor join values. So the two halves that the rotation pairs are loaded and stored separately, padded to powers of two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.paged_attention.triton_tiles import check_converts_e4m3
from pallas_kernels.pages import PagedKV

_STORED = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16")
_MAX_HEAD_DIM = 256
_MAX_POOL_ELEMENTS = 2**31  # offsets are int32
# Pairs of numbers that a program rotates, and that one of its warps does. Both set the order in which the squares of a norm are
# added. So they must not depend on the number of batch rows: the bits of a batch row are the same in every batch.
_PAIRS_PER_PROGRAM = 512
_PAIRS_PER_WARP = 256
_MAX_WARPS = 16
_TO_INTEGER, _TO_INTEGER_BITS = 1.5 * 2.0**23, 0x4B400000


class _Inputs(NamedTuple):
    k_pages: Array  # aliased with the first output
    v_pages: Array  # aliased with the second output
    qkv: Array
    cos: Array
    sin: Array
    page_ids: Array
    slot: Array
    position: Array
    q_norm: Array | None
    k_norm: Array | None
    k_scale: Array | None
    v_scale: Array | None


def rotary_write(
    qkv: Float32[Array, "B K G+2 D"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    norm_eps: float = 1e-6,
    interpret: bool = False,
) -> tuple[Float32[Array, "B H D"], Shaped[Array, "N K T D"], Shaped[Array, "N K T D"]]:
    """Computes `reference.rotary_write` in one pass over the projection, and writes the pages in place.

    Batch rows whose slot or page is "none" get their queries like all others. The bits of a batch row depend on no other
    one, nor on how many there are.

    Args:
      qkv, cos, sin, kv, slot, position, q_norm, k_norm, norm_eps: as in the reference; positions are not negative.
      interpret: whether to run in Pallas' interpreter, on any device and slowly.

    Raises:
      ValueError: if the head dimension is odd or above 256, if the pages have a dtype that `PagedKV` does not name or the GPU
        cannot convert, or if a page array has more than 2^31 elements.
    """
    num_rows, num_kv_heads, packed, head_dim = qkv.shape
    group_size = packed - 2
    _check(kv, head_dim)
    group_width, half_width = pl.next_power_of_2(group_size), pl.next_power_of_2(head_dim // 2)
    rows = max(_PAIRS_PER_PROGRAM // (group_width * half_width), 1)
    num_warps = min(max(rows * group_width * half_width // _PAIRS_PER_WARP, 1), _MAX_WARPS)
    inputs = _Inputs(kv.k, kv.v, qkv, cos, sin, kv.page_ids, slot, position, q_norm, k_norm, kv.k_scale, kv.v_scale)
    k_pages, v_pages, q = pl.pallas_call(
        functools.partial(_kernel, rows=rows, norm_eps=norm_eps, interpret=interpret),
        grid=(num_kv_heads, pl.cdiv(num_rows, rows)),
        out_shape=(
            jax.ShapeDtypeStruct(kv.k.shape, kv.k.dtype),
            jax.ShapeDtypeStruct(kv.v.shape, kv.v.dtype),
            jax.ShapeDtypeStruct((num_rows, num_kv_heads * group_size, head_dim), jnp.float32),
        ),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="rotary_write",
    )(inputs)
    return q, k_pages, v_pages


def _check(kv: PagedKV, head_dim: int) -> None:
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim is {head_dim}, but must be even and at most {_MAX_HEAD_DIM}: use backend 'reference'"
        )
    for pages in (kv.k, kv.v):
        if pages.dtype.name not in _STORED:
            raise ValueError(f"pages are {pages.dtype}, but must be one of {', '.join(_STORED)}")
        if pages.size > _MAX_POOL_ELEMENTS:
            raise ValueError(
                f"a page array of shape {pages.shape} has {pages.size} elements, more than {_MAX_POOL_ELEMENTS}: "
                "use fewer pages"
            )
        if pages.dtype == jnp.float8_e4m3fn:
            check_converts_e4m3()


def _kernel(inputs, k_pages, v_pages, q_out, *, rows: int, norm_eps: float, interpret: bool) -> None:
    num_rows, _, packed, head_dim = inputs.qkv.shape
    num_pages, _, page_size, _ = k_pages.shape
    num_slots, pages_per_slot = inputs.page_ids.shape
    group_size, half = packed - 2, head_dim // 2
    kv_head = pl.program_id(0)
    row = pl.program_id(1) * rows + jnp.arange(rows, dtype=jnp.int32)
    in_batch = row < num_rows

    slot = plgpu.load(inputs.slot.at[row], mask=in_batch, other=num_slots)
    position = plgpu.load(inputs.position.at[row], mask=in_batch, other=0)
    index, offset = lax.div(position, jnp.int32(page_size)), lax.rem(position, jnp.int32(page_size))
    has_page = (slot < num_slots) & (index < pages_per_slot)
    page = plgpu.load(inputs.page_ids.at[slot, index], mask=has_page, other=num_pages)

    # Tiles are [rows, heads, half of head_dim]; for keys and values there is one head.
    row, in_batch, page, offset = (x[:, None, None] for x in (row, in_batch, page, offset))
    head = jnp.arange(pl.next_power_of_2(group_size), dtype=jnp.int32)[None, :, None]
    key_head = jnp.full((1, 1, 1), group_size, jnp.int32)
    dim = jnp.arange(pl.next_power_of_2(half), dtype=jnp.int32)[None, None, :]
    in_half, starts = dim < half, (0, half)
    in_row = in_batch & in_half
    in_group = in_row & (head < group_size)
    cos, sin = (plgpu.load(ref.at[row, dim], mask=in_row, other=0.0) for ref in (inputs.cos, inputs.sin))

    def load(head, mask):
        return tuple(
            plgpu.load(inputs.qkv.at[row, kv_head, head, start + dim], mask=mask, other=0.0) for start in starts
        )

    def normalised(halves, scale):
        if scale is None:
            return halves
        squares = jnp.sum(jnp.square(halves[0]) + jnp.square(halves[1]), axis=2, keepdims=True)
        factor = lax.rsqrt(squares * (1 / head_dim) + norm_eps)
        return tuple(
            x * factor * plgpu.load(scale.at[start + dim], mask=in_half, other=0.0).astype(jnp.float32)
            for x, start in zip(halves, starts, strict=True)
        )

    def rotated(halves):
        first, second = halves
        return first * cos - second * sin, second * cos + first * sin

    def write(pages, halves, scale):
        for x, start in zip(halves, starts, strict=True):
            if scale is not None:
                x = _divided(x, plgpu.load(scale.at[kv_head]), interpret=interpret)
            ref = pages.at[page, kv_head, offset, start + dim]
            plgpu.store(ref, _stored(x, pages.dtype), mask=(page < num_pages) & in_half)

    write(k_pages, rotated(normalised(load(key_head, in_row), inputs.k_norm)), inputs.k_scale)
    write(v_pages, load(key_head + 1, in_row), inputs.v_scale)
    for x, start in zip(rotated(normalised(load(head, in_group), inputs.q_norm)), starts, strict=True):
        ref = q_out.at[row, kv_head * group_size + head, start + dim]
        plgpu.store(ref, x * head_dim**-0.5, mask=in_group)


def _divided(x: Float32[Array, "*shape"], scale: Float32[Array, ""], *, interpret: bool) -> Float32[Array, "*shape"]:
    """Returns x / scale, rounded to nearest. Triton's own division is off by up to two units, which would show in the pages."""
    if interpret:
        return x / scale
    (quotient,) = plgpu.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[x, jnp.full(x.shape, scale)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return quotient


def _stored(x: Float32[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Computes `pages.as_stored` in operations of Triton, except its minimum and maximum, which would drop a NaN."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if jnp.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = jnp.where(x > largest, largest, jnp.where(x < -largest, -largest, x))
    if dtype == jnp.int8:
        # Between 2^23 and 2^24 every float32 is an integer. So the sum is rounded to one, ties to even; its last bits are x.
        return (lax.bitcast_convert_type(x + _TO_INTEGER, jnp.int32) - _TO_INTEGER_BITS).astype(jnp.int8)
    return x.astype(dtype)
