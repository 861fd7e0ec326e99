"""The pages of one layer, the page table that assigns them to slots, and the formats of the numbers in them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped


class PagedKV(NamedTuple):
    """Keys and values of one layer.

    Pages hold float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, int8, or uint16, which means the bits of bfloat16. The
    value of a stored number is that number times the scale of its head. No array may have more than 2^31 elements, because
    kernels count in int32.
    """

    k: Shaped[Array, "N K T D"]
    v: Shaped[Array, "N K T D"]  # same dtype as k
    page_ids: Int32[Array, "S P"]  # page that holds the p-th T positions of the slot; N: none
    k_scale: Float32[Array, " K"] | None = None  # None: all scales are 1
    v_scale: Float32[Array, " K"] | None = None

    @property
    def num_slots(self) -> int:
        """S. As the slot of a batch row, it means that the row has no slot."""
        return self.page_ids.shape[0]

    @property
    def page_size(self) -> int:
        """T, the positions per page."""
        return self.k.shape[2]

    def page_of(self, slot: Int32[Array, " B"], position: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """Returns the page of each batch row's position; N ("none") where the row has no slot."""
        index = lax.div(position, jnp.int32(self.page_size))
        return self.page_ids.at[slot, index].get(mode="fill", fill_value=self.k.shape[0])


def as_float(pages: Shaped[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns stored numbers as float32, without their scales."""
    if pages.dtype == jnp.uint16:
        pages = lax.bitcast_convert_type(pages, jnp.bfloat16)
    return pages.astype(jnp.float32)


def as_stored(values: Float32[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Returns numbers, already divided by their scales, as pages of `dtype` hold them.

    Integers are rounded. int8 and 8-bit floats saturate.
    """
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(values, -largest, largest).astype(dtype)
    return values.astype(dtype)
