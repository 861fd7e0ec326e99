"""What attention over pages reads: the pages of one layer, the table that says whose they are, and the scales."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped


class PagedKV(NamedTuple):
    """Keys and values of one layer.

    Pages hold floating-point numbers (float32, bfloat16, float16, float8_e4m3fn, float8_e5m2), int8, or uint16, which means
    the bits of bfloat16. What a position stands for is the stored number times its head's scale. No array may have more than
    2^31 elements: kernels count in int32.
    """

    k: Shaped[Array, "N K T D"]
    v: Shaped[Array, "N K T D"]  # as k
    page_ids: Int32[Array, "S P"]  # page that holds the slot's p-th T positions; N = none
    k_scale: Float32[Array, " K"] | None = None  # None: 1
    v_scale: Float32[Array, " K"] | None = None

    @property
    def num_slots(self) -> int:
        """S, which as the slot of a row means "none"."""
        return self.page_ids.shape[0]

    @property
    def page_size(self) -> int:
        """T, positions per page."""
        return self.k.shape[2]

    def page_of(self, slot: Int32[Array, " B"], position: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """The page of each row's position; N where the row has no slot."""
        index = lax.div(position, jnp.int32(self.page_size))
        return self.page_ids.at[slot, index].get(mode="fill", fill_value=self.k.shape[0])


def as_float(pages: Shaped[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Stored numbers, scales left out, as float32."""
    if pages.dtype == jnp.uint16:
        pages = lax.bitcast_convert_type(pages, jnp.bfloat16)
    return pages.astype(jnp.float32)


def as_stored(values: Float32[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Numbers, already divided by their scales, as pages of `dtype` hold them: integers rounded, and both kinds of 8 bits
    saturated."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(values, -largest, largest).astype(dtype)
    return values.astype(dtype)
