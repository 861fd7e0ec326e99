"""All blocks of a transformer in one kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Num, Shaped

from pallas_kernels.native.attention import paged_attention, rotary_write, serves
from pallas_kernels.native.call import kernel, size_or_all, vector_or_empty
from pallas_kernels.native.packing import GATED_RUN, INT8_HEADER_PAIRS, PANEL_SIZE
from pallas_kernels.pages import PagedKV


class PagedBatch(NamedTuple):
    """Batch rows of sequences whose keys and values lie in pages. It can be called as a `jaxserve.models.Attend`."""

    page_ids: Int32[Array, "S P"]  # the page table
    slot: Int32[Array, " B"]  # S: no slot, so the keys and values of the batch row are not stored
    position: Int32[Array, " B"]
    batch_size: Int32[Array, ""] | None = None  # batch rows in use; None: all

    def __call__(
        self, projection: Any, kv: tuple[Array, Array], *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], tuple[Array, Array]]:
        """Writes keys and values to their pages and attends, for models whose weights are not packed."""
        del layer
        qkv, cos, sin, q_norm, k_norm, norm_eps = projection
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
        pages, rows = PagedKV(*kv, self.page_ids), (self.slot, self.position)
        q, k, v = rotary_write(qkv, cos, sin, pages, *rows, **norms, batch_size=self.batch_size)
        out = paged_attention(q, pages._replace(k=k, v=v), *rows, window=window, batch_size=self.batch_size)
        return out, (k, v)


class BlockWeights(NamedTuple):
    """The weights of a pre-norm block with SwiGLU, named as in `jaxserve.models.layers`; None: the model has no such weight."""

    qkv: Num[Array, "N/64 E/2 _ _"]  # for each kv head its G query heads, its key, its value
    qkv_bias: Float[Array, " N"] | None
    out: Num[Array, "E/64 H*D/2 _ _"]
    out_bias: Float[Array, " E"] | None
    gate_up: Num[Array, "2F/64 E/2 _ _"]
    gate_up_bias: Float[Array, "2 F"] | None
    down: Num[Array, "E/64 F/2 _ _"]
    down_bias: Float[Array, " E"] | None
    attention_norm: Float[Array, " E"]  # scales of the norms
    ffw_norm: Float[Array, " E"]
    q_norm: Float[Array, " D"] | None
    k_norm: Float[Array, " D"] | None


def blocks(
    x: Float32[Array, "B E"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    weights: Sequence[BlockWeights],
    pages: Sequence[tuple[Shaped[Array, "P K T D"], Shaped[Array, "P K T D"]]],
    batch: PagedBatch,
    *,
    ffw_dim: int,
    group_size: int,
    eps: float,
    windows: Sequence[int | None],
) -> tuple[Float32[Array, "B E"], list[tuple[Array, Array]]]:
    """Runs all blocks of a transformer, with the bits that `product`, `rotary_write` and `paged_attention` give one by one.

    It is one call because with few batch rows the way from one kernel to the next costs as much as the kernels themselves.

    Args:
      x: the embedded tokens.
      cos, sin: cosines and sines of the rotary angles of each batch row.
      weights: the weights of each layer.
      pages: keys and values per layer, written in place.
      batch: slot and position of each batch row, and the page table.
      ffw_dim: F.
      group_size: G, query heads per kv head.
      eps: number that every norm adds to its mean square.
      windows: the window of each layer; None: no window.

    Returns:
      The output of the last block, and the pages of each layer.

    Raises:
      ValueError: if a weight is not packed, the weights differ in dtype, or the size of an array does not fit the others.
    """
    _check(x, weights, pages, ffw_dim=ffw_dim, group_size=group_size)
    num_rows, half = x.shape[0], pages[0][0].shape[3] // 2
    shapes = [array.shape for array in (cos, sin, batch.slot, batch.position)]
    if shapes != [(num_rows, half)] * 2 + [(num_rows,)] * 2:
        raise ValueError(
            f"cos, sin, slot and position have the shapes {shapes}, but x has {num_rows} batch rows and heads have {2 * half} "
            f"dimensions: make them {[num_rows, half]} and {[num_rows]}"
        )
    layers = []
    for layer, (k, v) in zip(weights, pages, strict=True):
        layers += [w if w is not None and w.ndim == 4 else vector_or_empty(w) for w in layer] + [k, v]
    size = size_or_all(batch.batch_size, num_rows)
    shared = (x, cos, sin, batch.page_ids, batch.slot, batch.position, size)
    stride, first = len(BlockWeights._fields) + 2, len(shared) + len(BlockWeights._fields)
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    results += [jax.ShapeDtypeStruct(array.shape, array.dtype) for pair in pages for array in pair]
    aliases = {first + stride * (i // 2) + i % 2: 1 + i for i in range(2 * len(pages))}
    y, *pages = kernel("jaxserve_blocks", results, input_output_aliases=aliases)(
        *shared,
        *layers,
        ffw_dim=np.int64(ffw_dim),
        group_size=np.int64(group_size),
        eps=np.float32(eps),
        windows=np.array([window or 0 for window in windows], np.int64),
    )
    return y, list(zip(pages[::2], pages[1::2], strict=True))


def _check(x: Any, weights: Any, pages: Any, *, ffw_dim: int, group_size: int) -> None:
    """Checks dtypes and shapes, because the kernel reads its buffers without checking most of their shapes."""
    k = pages[0][0]
    (_, num_kv_heads, _, head_dim), embed_dim = k.shape, x.shape[1]
    heads, width = num_kv_heads * group_size * head_dim, num_kv_heads * (group_size + 2) * head_dim
    gated = 2 * -(-ffw_dim // GATED_RUN) * GATED_RUN
    sizes = {
        "qkv": (embed_dim, width),
        "out": (heads, embed_dim),
        "gate_up": (embed_dim, gated),
        "down": (ffw_dim, embed_dim),
    }
    lengths = {"qkv_bias": width, "out_bias": embed_dim, "gate_up_bias": 2 * ffw_dim, "down_bias": embed_dim}
    lengths |= {"attention_norm": embed_dim, "ffw_norm": embed_dim, "q_norm": head_dim, "k_norm": head_dim}
    dtype = weights[0].qkv.dtype
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        raise ValueError(f"packed weights must be float32, bfloat16 or int8, not {dtype}: convert them before packing")
    header_pairs = INT8_HEADER_PAIRS if dtype == jnp.int8 else 0
    for number, (layer, arrays) in enumerate(zip(weights, pages, strict=True)):
        for name, w in layer._asdict().items():
            if name in sizes:
                num_inputs, num_columns = sizes[name]
                if w.ndim != 4:
                    raise ValueError(
                        f"{name} is not packed: its shape is {w.shape}; `pack` it, or `prepare` all parameters"
                    )
                expected = -(-num_columns // PANEL_SIZE), header_pairs + -(-num_inputs // 2)
                if (w.dtype, w.shape[:2]) != (dtype, expected):
                    raise ValueError(
                        f"{name} of layer {number} is {w.dtype}{list(w.shape)}, where {dtype}{list(expected)} and two more "
                        "axes are needed: pack weights of one dtype and of this model"
                    )
            elif w is not None and w.size != lengths[name]:
                raise ValueError(
                    f"{name} of layer {number} has {w.size} elements, but this model needs {lengths[name]}: pass its own"
                )
        for array in arrays:
            if (array.shape, array.dtype) != (k.shape, k.dtype):
                raise ValueError(
                    f"pages of layer {number} are {array.dtype}{list(array.shape)}, those of layer 0 {k.dtype}{list(k.shape)}: "
                    "make them alike"
                )
    if not serves(PagedKV(k, k, k), group_size):
        raise ValueError(
            f"no native attention over {k.dtype} pages with head_dim={head_dim} and groups of {group_size} heads: "
            "use backend 'reference'"
        )
