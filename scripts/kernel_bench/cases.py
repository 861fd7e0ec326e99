"""Cases of the kernel benchmark: their data, the amount of their work, and the check of a result."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped
from lib.random_pages import STORED_STEP, random_pages

from jaxserve.core.cache.kv_pool import stores_bits
from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.reference import paged_attention
from pallas_kernels.paged_attention.shapes import AttentionShape
from pallas_kernels.pages import as_float
from pallas_kernels.rotary_write.reference import rotary_write

OPS = ("decode", "chunk", "rotary_write")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
_MAX_ELEMENTS = 2**31  # per array: offsets in kernels are int32
_MAX_POOLS = 64
_CACHES = 4  # the pools together are this many times the cache
_CHECKED_ROWS = 64

# Bounds of the relative error, as the length of a head's vector, that rounding to the dtype of the pages explains. Attention
# rounds queries and weights, about ten times the unit; it computes 8-bit pages in 16 bits. A written vector is rounded once.
_ATTENTION_BOUND = {"float32": 1e-4, "float16": 5e-3}
_NARROW_ATTENTION_BOUND = 2e-2
_WRITE_BOUND = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10, "float8_e4m3fn": 2**-3, "int8": 0.05}
_QUERY_BOUND = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
      op: one of `OPS`.
      shape: heads, page size and options.
      dtype: dtype of the pages.
      batch: number of batch rows: for decode and rotary_write the last one of each sequence, for chunk the last ones of one
        sequence.
      context: tokens of every sequence.
      num_splits: splits of decode; None: chosen from the shapes.
    """

    op: str
    shape: AttentionShape
    dtype: str
    batch: int
    context: int
    num_splits: int | None = None

    @property
    def num_slots(self) -> int:
        return 1 if self.op == "chunk" else self.batch

    @property
    def pages_per_slot(self) -> int:
        return -(-self.context // self.shape.page_size)

    @property
    def num_pages(self) -> int:
        """The pages of one pool, all of them in use."""
        return self.num_slots * self.pages_per_slot

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def pool_elements(self) -> int:
        """Elements of the keys, or of the values, of one pool."""
        return self.num_pages * self.shape.num_kv_heads * self.shape.page_size * self.shape.head_dim

    @property
    def pool_bytes(self) -> int:
        return 2 * self.pool_elements * self.itemsize

    @property
    def num_keys(self) -> int:
        """Positions of a sequence that are read, because one of its batch rows sees them."""
        rows = self.batch if self.op == "chunk" else 1
        return self.context if self.shape.window is None else min(self.context, self.shape.window + rows - 1)

    @property
    def bytes_moved(self) -> int:
        """The bytes that must be read or written once: visible keys and values, queries, results, the page table."""
        shape, heads = self.shape, self.batch * self.shape.num_heads * self.shape.head_dim
        if self.op == "rotary_write":
            written = 2 * self.batch * shape.num_kv_heads * shape.head_dim
            return 4 * (heads + written + self.batch * shape.head_dim) + 4 * heads + written * self.itemsize
        keys = 2 * self.num_slots * self.num_keys * shape.num_kv_heads * shape.head_dim * self.itemsize
        return keys + 2 * 4 * heads + 4 * self.num_slots * -(-self.num_keys // shape.page_size)

    @property
    def flops(self) -> int | None:
        """Operations of the two products over the positions that batch rows see; None if there are no products."""
        if self.op == "rotary_write":
            return None
        first = self.context - self.batch if self.op == "chunk" else self.context - 1
        seen = np.arange(first, self.context, dtype=np.int64) + 1
        seen = seen if self.shape.window is None else np.minimum(seen, self.shape.window)
        return int(4 * self.shape.num_heads * self.shape.head_dim * seen.sum() * self.num_slots)

    def num_pools(self, cache_bytes: int, budget_bytes: int) -> tuple[int, int]:
        """Returns how many pools to use, and how many would hold 4 times the cache together: at most 64, and as memory allows.

        Raises:
          ValueError: if not even one pool fits.
        """
        if self.op == "chunk" and self.batch > self.context:
            raise ValueError(f"{self.batch} rows are more than the {self.context} tokens of the context")
        if self.pool_elements > _MAX_ELEMENTS:
            raise ValueError(
                f"the pool has {self.pool_elements} elements, above the 2^31 that 32-bit offsets reach: "
                "lower --batch or --context"
            )
        if self.pool_bytes > budget_bytes:
            raise ValueError(
                f"the pool takes {self.pool_bytes / 2**30:.1f} GiB, above the {budget_bytes / 2**30:.1f} GiB set aside "
                "for it (a fifth of the free memory): lower --batch or --context"
            )
        enough = min(max(-(-_CACHES * cache_bytes // self.pool_bytes), 1), _MAX_POOLS)
        return min(enough, _MAX_ELEMENTS // self.pool_elements, budget_bytes // self.pool_bytes), enough


class Data(NamedTuple):
    """The arrays of a case. W pools lie in one array, each in pages of its own."""

    q: Float32[Array, "B H D"]
    k: Shaped[Array, "W*N K T D"]
    v: Shaped[Array, "W*N K T D"]
    tables: Int32[Array, "W S P"]  # page ids of each pool's sequences
    slot: Int32[Array, " B"]
    position: Int32[Array, " B"]
    k_scale: Float32[Array, " K"] | None
    v_scale: Float32[Array, " K"] | None
    sinks: Float32[Array, " H"] | None
    qkv: Float32[Array, "B K G+2 D"] | None  # set for rotary_write only, like cos and sin
    cos: Float32[Array, "B D/2"] | None
    sin: Float32[Array, "B D/2"] | None

    @property
    def num_pools(self) -> int:
        return self.tables.shape[0]

    def kv(self, page_ids: Int32[Array, "S P"]) -> PagedKV:
        """Returns the pages and the page table of one pool."""
        return PagedKV(self.k, self.v, page_ids, self.k_scale, self.v_scale)


def make_data(case: Case, num_pools: int, seed: int) -> Data:
    """Makes random numbers on the device, in pages strewn over their pool. bfloat16 is kept as bits where engines do."""
    shape, keys = case.shape, jax.random.split(jax.random.key(seed), 6)
    pool = (num_pools * case.num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
    stored = "uint16" if case.dtype == "bfloat16" and stores_bits("reference") else case.dtype
    scale = None
    if case.dtype in STORED_STEP:
        scale = STORED_STEP[case.dtype] * jnp.linspace(0.9, 1.1, shape.num_kv_heads, dtype=jnp.float32)
    rng = np.random.default_rng(seed)
    tables = [rng.permutation(case.num_pages) + index * case.num_pages for index in range(num_pools)]
    last = np.arange(case.context - case.num_keys, case.context)
    chunk = case.op == "chunk"
    slot = np.zeros(case.batch) if chunk else np.arange(case.batch)
    position = last[-case.batch :] if chunk else np.full(case.batch, case.context - 1)
    qkv = cos = sin = None
    if case.op == "rotary_write":
        qkv = jax.random.normal(keys[4], (case.batch, shape.num_kv_heads, shape.group_size + 2, shape.head_dim))
        angles = jax.random.uniform(keys[5], (case.batch, shape.head_dim // 2), maxval=6.28)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Data(
        q=jax.random.normal(keys[0], (case.batch, shape.num_heads, shape.head_dim)) * (2 * shape.head_dim**-0.5),
        k=random_pages(keys[1], pool, stored),
        v=random_pages(keys[2], pool, stored),
        tables=jnp.asarray(np.reshape(tables, (num_pools, case.num_slots, case.pages_per_slot)), jnp.int32),
        slot=jnp.asarray(slot, jnp.int32),
        position=jnp.asarray(position, jnp.int32),
        k_scale=scale,
        v_scale=scale,
        sinks=jax.random.normal(keys[3], (shape.num_heads,)) if shape.sinks else None,
        qkv=qkv,
        cos=cos,
        sin=sin,
    )


def errors(case: Case, data: Data, result: Any) -> list[tuple[float, float]]:
    """Returns how far a result of the last pool is from the reference, and the bound, for each part of it.

    Args:
      case, data: the case, and its data before anything was written to the pages.
      result: for attention [B, H, D], of which at most 64 rows are compared; for rotary_write queries, keys and values.
    """
    kv = data.kv(data.tables[-1])
    if case.op == "rotary_write":
        expected = jax.jit(rotary_write)(data.qkv, data.cos, data.sin, kv, data.slot, data.position)
        q_error = _relative_error(result[0], expected[0])
        last = slice(-case.num_pages, None)
        written = zip(result[1:], expected[1:], strict=True)
        page_errors = [_relative_error(as_float(pages[last]), as_float(enough[last])) for pages, enough in written]
        return [(q_error, _QUERY_BOUND), *((error, _WRITE_BOUND[case.dtype]) for error in page_errors)]
    rows = np.unique(np.linspace(0, case.batch - 1, min(case.batch, _CHECKED_ROWS)).astype(np.int32))
    attend = functools.partial(paged_attention, window=case.shape.window, softcap=case.shape.softcap, sinks=data.sinks)
    expected = jax.jit(attend)(data.q[rows], kv, data.slot[rows], data.position[rows])
    bound = _ATTENTION_BOUND.get(case.dtype, _NARROW_ATTENTION_BOUND)
    return [(_relative_error(jnp.asarray(result)[rows], expected), bound)]


@jax.jit
def _largest_error(actual: Float[Array, "*B D"], expected: Float[Array, "*B D"]) -> Float32[Array, ""]:
    difference = jnp.linalg.norm(actual.astype(jnp.float32) - expected, axis=-1)
    error = difference / jnp.maximum(jnp.linalg.norm(expected, axis=-1), jnp.finfo(jnp.float32).tiny)
    return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))


def _relative_error(actual: Float[Array, "*B D"], expected: Float[Array, "*B D"]) -> float:
    """Returns the largest relative error in length, over vectors along the last axis."""
    return float(_largest_error(actual, expected))
