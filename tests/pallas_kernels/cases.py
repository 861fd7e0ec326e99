"""Cases of attention over pages for every backend's tests, an oracle in float64, and the error that it allows."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.shapes import AttentionShape

PAGES_PER_SLOT = 4
NUM_SLOTS = 7
_F32 = 2.0**-24  # largest relative error of rounding to float32
_ROWS_MULTIPLE = 128  # of a batch of chunks, so that different cases share compiled programs
_ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A pool, its page table, and rows to attend for. Arrays are NumPy's."""

    shape: AttentionShape
    q: np.ndarray  # [B, H, D]
    k: np.ndarray  # [N, K, T, D]
    v: np.ndarray
    page_ids: np.ndarray  # [S, P]
    slot: np.ndarray  # [B]
    position: np.ndarray
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    sinks: np.ndarray | None

    @property
    def kv(self) -> PagedKV:
        scales = [None if scale is None else jnp.asarray(scale) for scale in (self.k_scale, self.v_scale)]
        return PagedKV(jnp.asarray(self.k), jnp.asarray(self.v), jnp.asarray(self.page_ids), *scales)

    @property
    def rows(self) -> tuple:
        """Positional arguments of the attention functions."""
        return jnp.asarray(self.q), self.kv, jnp.asarray(self.slot), jnp.asarray(self.position)

    @property
    def options(self) -> dict:
        """Keyword arguments of the attention functions."""
        sinks = None if self.sinks is None else jnp.asarray(self.sinks)
        return {"window": self.shape.window, "softcap": self.shape.softcap, "sinks": sinks}

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def seen_by(self, row: int) -> range:
        if self.slot[row] == len(self.page_ids):
            return range(0)
        last, window = int(self.position[row]), self.shape.window
        return range(0 if window is None else max(last - window + 1, 0), last + 1)

    def poisoned(self) -> "Case":
        """NaN (for int8: its lowest number) in all that no row sees, free pages and tails of pages included."""
        seen = np.zeros((self.k.shape[0], self.k.shape[2]), bool)
        for row in range(len(self.slot)):
            positions = np.array(self.seen_by(row), int)
            if not positions.size:
                continue
            seen[self.page_ids[self.slot[row], positions // self.k.shape[2]], positions % self.k.shape[2]] = True
        if self.k.dtype == np.uint16:
            poison = np.uint16(0x7FC0)
        else:
            poison = np.int8(-128) if self.k.dtype == np.int8 else np.array(np.nan, self.k.dtype)
        k, v = (np.where(seen[:, None, :, None], pages, poison) for pages in (self.k, self.v))
        return self.replace(k=k, v=v)


def make_case(
    shape: AttentionShape,
    dtype: str,
    *,
    chunks: bool = False,
    seed: int = 0,
    pages_per_slot: int = PAGES_PER_SLOT,
    max_rows_per_slot: int = 1000,
) -> Case:
    """Slots of lengths 0, 1, a page less one, a page, a page and one, the longest, and a random one.

    Pages are strewn over the pool, with some left free, and the last slot shares its first page with the longest.

    Args:
      shape: heads, page size and options.
      dtype: of the pages; 8-bit ones get scales; "uint16" means the bits of bfloat16.
      chunks: rows are runs of positions that end with a slot's last, one slot after the other, padding rows between and after;
        otherwise each slot has its last position, some have others too, and padding rows lie in between, all shuffled.
      seed: of everything random.
      pages_per_slot: P.
      max_rows_per_slot: longest run with `chunks`.
    """
    rng = np.random.default_rng(seed)
    page_size, longest = shape.page_size, shape.page_size * pages_per_slot
    lengths = np.array([longest, 0, 1, page_size - 1, page_size, page_size + 1, rng.integers(page_size + 1, longest)])
    num_pages = NUM_SLOTS * pages_per_slot + 3
    page_ids = rng.permutation(num_pages)[: NUM_SLOTS * pages_per_slot].reshape(NUM_SLOTS, pages_per_slot)
    page_ids[np.arange(pages_per_slot)[None, :] * page_size >= lengths[:, None]] = num_pages
    page_ids[-1, 0] = page_ids[0, 0]
    slot, position = (_chunk_rows if chunks else _single_rows)(rng, lengths, max_rows_per_slot)
    pool = (num_pages, shape.num_kv_heads, page_size, shape.head_dim)
    k, k_scale = _stored(rng, pool, dtype)
    v, v_scale = _stored(rng, pool, dtype)
    q = rng.standard_normal((len(slot), shape.num_heads, shape.head_dim)) * 2 * shape.head_dim**-0.5
    return Case(
        shape=shape,
        q=q.astype(np.float32),
        k=k,
        v=v,
        page_ids=page_ids.astype(np.int32),
        slot=slot.astype(np.int32),
        position=position.astype(np.int32),
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=rng.standard_normal(shape.num_heads).astype(np.float32) if shape.sinks else None,
    )


def _single_rows(rng, lengths: np.ndarray, _) -> tuple[np.ndarray, np.ndarray]:
    used = np.flatnonzero(lengths)
    slot = np.concatenate([used, used[rng.integers(0, len(used), 3)], np.full(3, NUM_SLOTS)])
    position = np.append(lengths, 1)[slot] - 1
    position[len(used) :] = rng.integers(0, position[len(used) :] + 1)
    order = rng.permutation(len(slot))
    return slot[order], position[order]


def _chunk_rows(rng, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    slots, positions = [], []
    for slot in rng.permutation(np.flatnonzero(lengths)):
        count = int(min(rng.integers(1, lengths[slot] + 1), most))
        if slot in (0, 5):
            count = int(min(lengths[slot], most))  # whole prompts, or their longest ends
        slots.append(np.full(count, slot))
        positions.append(np.arange(lengths[slot] - count, lengths[slot]))
    num_rows = sum(map(len, slots))
    padding = 5 + -(num_rows + 5) % _ROWS_MULTIPLE
    slots.append(np.full(padding, NUM_SLOTS))
    positions.append(np.zeros(padding, int))
    return np.concatenate(slots), np.concatenate(positions)


def _stored(rng, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype == "uint16":
        return values.astype(jnp.bfloat16).view(np.uint16), None
    if np.dtype(jnp.dtype(dtype)).itemsize > 1:
        return values.astype(jnp.dtype(dtype)), None
    largest = 127.0 if dtype == "int8" else 16.0
    scale = (np.abs(values).max(axis=(0, 2, 3)) / largest * rng.uniform(0.9, 1.1, shape[1])).astype(np.float32)
    values = values / scale[None, :, None, None]
    values = np.clip(np.round(values), -127, 127) if dtype == "int8" else values
    return values.astype(jnp.dtype(dtype)), scale


@functools.lru_cache(maxsize=8)  # backends share a case, and its results are only read
def dense(case: Case, compute: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention row by row in float64, and the error that a narrower computation may make, both [B, H, D].

    Args:
      case: what to compute.
      compute: what operands of products are rounded to, sums being float32 ("float32": operands are not rounded).

    The bound follows the arithmetic, taking rounding errors as independent: n of size u add up to less than 4 sqrt(n) u,
    with a chance of 1 in 1,000 to exceed it if all were of full size (Higham and Mary, 2019), which they are not. Let c be
    the rounding to `compute`, w the normalised weights. A score's error e: 4 c times the length of the vector q * k, and
    4 (sqrt(D) + 4) u times |q| . |k| (4: scaling, and the exponential's argument). A weight's: 2 e, as numerator and
    denominator have it. The sum over n positions adds 4 c times the length of the vector w * v, and
    4 (sqrt(n) + 8) u times w . |v| (8: exponential, corrections, division). A NaN where none is due exceeds any bound.
    """
    k, v = (
        (array.view(jnp.bfloat16) if array.dtype == np.uint16 else array).astype(np.float64)
        for array in (case.k, case.v)
    )
    k = k if case.k_scale is None else k * case.k_scale[:, None, None].astype(np.float64)
    v = v if case.v_scale is None else v * case.v_scale[:, None, None].astype(np.float64)
    q, group, c = case.q.astype(np.float64), case.shape.group_size, _ROUNDING[compute]
    page_size, head_dim = k.shape[2:]
    out, bound = np.zeros_like(q), np.zeros_like(q)
    for row in range(len(case.slot)):
        seen = np.array(case.seen_by(row), int)
        if not seen.size:
            continue
        pages, offsets = case.page_ids[case.slot[row], seen // page_size], seen % page_size
        keys, values = (x[pages, :, offsets].repeat(group, axis=1) for x in (k, v))  # [n, H, D]
        scores = np.einsum("hd,nhd->nh", q[row], keys)
        products = np.abs(q[row][None] * keys)
        score_error = 4 * c * np.sqrt(np.square(products).sum(-1)) + 4 * (head_dim**0.5 + 4) * _F32 * products.sum(-1)
        if case.shape.softcap is not None:  # its slope is at most 1; tanh as an expression of exponentials
            scores = case.shape.softcap * np.tanh(scores / case.shape.softcap)
            score_error = score_error + 8 * _F32 * case.shape.softcap
        sink = np.full(len(q[row]), -np.inf) if case.sinks is None else case.sinks.astype(np.float64)
        largest = np.maximum(scores.max(0), sink)
        weights = np.exp(scores - largest)
        weights /= weights.sum(0) + np.exp(sink - largest)
        out[row] = np.einsum("nh,nhd->hd", weights, values)
        weighted = weights[:, :, None] * np.abs(values)
        relative = 2 * score_error.max(0) + 4 * (seen.size**0.5 + 8) * _F32
        bound[row] = relative[:, None] * weighted.sum(0) + 4 * c * np.sqrt(np.square(weighted).sum(0))
    return out, bound


def assert_close(actual, case: Case, compute: str = "float32") -> None:
    """Fails if an element is further from the oracle than its bound."""
    expected, bound = dense(case, compute)
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - bound
    wrong = ~(excess <= 0)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements beyond their bound; first {np.argwhere(wrong)[0]}, "
        + (f"{actual[wrong][0]} for {expected[wrong][0]} within {bound[wrong][0]:.2g}")
    )
