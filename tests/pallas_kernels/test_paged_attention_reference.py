"""Attention over pages, as specified by the reference, against dense softmax attention in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.reference import paged_attention

ATTENTION = jax.jit(paged_attention, static_argnames="window")
NUM_SLOTS, NUM_ROWS, HEAD_DIM = 5, 12, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A pool, its page table, and rows to attend for. Arrays are NumPy's."""

    q: np.ndarray  # [B, H, D]
    k: np.ndarray  # [N, K, T, D]
    v: np.ndarray
    page_ids: np.ndarray  # [S, P]
    slot: np.ndarray  # [B]
    position: np.ndarray
    window: int | None

    def run(self) -> np.ndarray:
        q, k, v, page_ids, slot, position = map(
            jnp.asarray, (self.q, self.k, self.v, self.page_ids, self.slot, self.position)
        )
        return np.asarray(ATTENTION(q, PagedKV(k, v, page_ids), slot, position, window=self.window))

    def seen_by(self, row: int) -> range:
        if self.slot[row] == NUM_SLOTS:
            return range(0)
        last = int(self.position[row])
        return range(0 if self.window is None else max(last - self.window + 1, 0), last + 1)

    def poisoned(self) -> "Case":
        """NaN in all that no row sees, free pages and tails of pages included."""
        seen = np.zeros((self.k.shape[0], self.k.shape[2]), bool)
        for row in range(len(self.slot)):
            for position in self.seen_by(row):
                page, offset = divmod(position, self.k.shape[2])
                seen[self.page_ids[self.slot[row], page], offset] = True
        nan = np.uint16(0x7FC0) if self.k.dtype == np.uint16 else self.k.dtype.type(np.nan)
        k, v = (np.where(seen[:, None, :, None], pages, nan) for pages in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)


def make_case(seed: int, page_size: int, group: int, window: int | None = None, dtype=np.float32, pages=5) -> Case:
    """Slots of all lengths with their pages strewn over the pool, the second sharing its first page with the first."""
    rng = np.random.default_rng(seed)
    num_kv_heads, num_pages = 2, NUM_SLOTS * pages + 3
    lengths = rng.integers(1, page_size * pages + 1, NUM_SLOTS)
    lengths[:2] = page_size * pages, page_size + 1
    page_ids = rng.permutation(num_pages)[: NUM_SLOTS * pages].reshape(NUM_SLOTS, pages)
    page_ids[np.arange(pages)[None, :] * page_size >= lengths[:, None]] = num_pages
    page_ids[1, 0] = page_ids[0, 0]
    slot = np.concatenate([np.arange(NUM_SLOTS), rng.integers(0, NUM_SLOTS + 1, NUM_ROWS - NUM_SLOTS)])
    slot[-2] = NUM_SLOTS  # a padding row
    position = rng.integers(0, np.append(lengths, 1)[slot])
    position[:NUM_SLOTS] = lengths - 1
    order = rng.permutation(NUM_ROWS)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def stored(values: np.ndarray) -> np.ndarray:
        if dtype == np.uint16:
            return values.astype(jnp.bfloat16).view(np.uint16)
        return values.astype(dtype)

    shape = (num_pages, num_kv_heads, page_size, HEAD_DIM)
    return Case(
        q=numbers(NUM_ROWS, num_kv_heads * group, HEAD_DIM),
        k=stored(numbers(*shape)),
        v=stored(numbers(*shape)),
        page_ids=page_ids.astype(np.int32),
        slot=slot[order].astype(np.int32),
        position=position[order].astype(np.int32),
        window=window,
    )


def dense(case: Case) -> np.ndarray:
    """Row by row in float64, over the positions that the row sees."""
    q, k, v = (
        (array.view(jnp.bfloat16) if array.dtype == np.uint16 else array).astype(np.float64)
        for array in (case.q, case.k, case.v)
    )
    page_size, group = k.shape[2], q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for row in range(len(case.slot)):
        seen = np.array(case.seen_by(row), int)
        if not seen.size:
            continue
        pages, offsets = case.page_ids[case.slot[row], seen // page_size], seen % page_size
        for head in range(q.shape[1]):
            scores = k[pages, head // group, offsets] @ q[row, head]
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[pages, head // group, offsets] / weights.sum()
    return out


SHAPES = [
    pytest.param(8, 1, None, np.float32, id="page 8"),
    pytest.param(8, 4, 20, np.float32, id="page 8, window 20"),
    pytest.param(16, 2, None, np.uint16, id="page 16, bits of bfloat16"),
    pytest.param(16, 7, 1, np.float32, id="page 16, window 1"),
    pytest.param(64, 4, None, np.float32, id="page 64"),
    pytest.param(64, 2, 100, np.uint16, id="page 64, window 100, bits of bfloat16"),
    pytest.param(128, 7, None, np.float32, id="page 128"),
    pytest.param(128, 1, 130, np.float16, id="page 128, window 130, float16"),
    pytest.param(16, 2, 1000, jnp.bfloat16, id="page 16, window beyond all, bfloat16"),
]
shapes = pytest.mark.parametrize(("page_size", "group", "window", "dtype"), SHAPES)


@shapes
def test_it_is_softmax_attention_to_the_positions_that_a_row_sees(page_size, group, window, dtype):
    for seed in range(4):
        case = make_case(seed, page_size, group, window, dtype)
        assert NUM_SLOTS in case.slot
        np.testing.assert_allclose(case.run(), dense(case), atol=2e-6)


@shapes
def test_what_no_row_sees_reaches_none_be_it_nan(page_size, group, window, dtype):
    for seed in range(4):
        case = make_case(seed, page_size, group, window, dtype)
        poisoned = case.poisoned()
        assert np.any(poisoned.k != case.k)
        np.testing.assert_array_equal(poisoned.run(), case.run())


def test_a_row_does_not_see_what_another_row_of_its_slot_sees():
    """Rows of a chunk: the first one must not be reached by the keys of the later ones."""
    case = make_case(0, 16, 2)
    slot, position = np.full(NUM_ROWS, 0, np.int32), np.arange(20, 20 + NUM_ROWS, dtype=np.int32)
    case = dataclasses.replace(case, slot=slot, position=position)
    expected = case.run()
    k, v = case.k.copy(), case.v.copy()
    page, offset = divmod(21, 16)
    k[case.page_ids[0, page], :, offset:] = np.nan
    v[case.page_ids[0, page], :, offset:] = np.nan
    broken = dataclasses.replace(case, k=k, v=v).run()
    np.testing.assert_array_equal(broken[0], expected[0])
    assert np.isnan(broken[1:]).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_that_a_row_does_see_is_not_hidden(where):
    case = make_case(0, 16, 2)
    row = int(np.flatnonzero(case.slot == 2)[0])
    broken = getattr(case, where).copy()
    if where == "q":
        broken[row, 0, 0] = np.nan
    else:
        broken[case.page_ids[2, 0], 0, 0, 0] = np.nan
    out = dataclasses.replace(case, **{where: broken}).run()
    assert np.isnan(out[row, 0]).any()
    assert not np.isnan(out[case.slot != 2]).any()


def test_padding_rows_give_zero_also_when_there_is_nothing_else():
    case = make_case(1, 16, 2)
    padding = dataclasses.replace(case, slot=np.full(NUM_ROWS, NUM_SLOTS, np.int32))
    assert not padding.run().any()
    assert not case.run()[case.slot == NUM_SLOTS].any()


@shapes
def test_a_rows_bits_do_not_depend_on_other_rows_and_how_far_they_reach(page_size, group, window, dtype):
    case = make_case(5, page_size, group, window, dtype)
    expected = case.run()
    for row in np.flatnonzero(case.slot < NUM_SLOTS):
        others = np.full(NUM_ROWS, NUM_SLOTS, np.int32)
        others[row] = case.slot[row]
        alone = dataclasses.replace(case, slot=others)
        np.testing.assert_array_equal(alone.run()[row], expected[row])
        shorter = np.where(np.arange(NUM_ROWS) == row, case.position, case.position // 3)
        np.testing.assert_array_equal(dataclasses.replace(case, position=shorter).run()[row], expected[row])


@shapes
def test_bits_do_not_depend_on_places_of_rows_slots_and_pages(page_size, group, window, dtype):
    case = make_case(6, page_size, group, window, dtype)
    expected, rng = case.run(), np.random.default_rng(0)
    num_pages = len(case.k)
    rows, slots, pages = rng.permutation(NUM_ROWS), rng.permutation(NUM_SLOTS), rng.permutation(num_pages)
    new_slot, new_page = np.append(np.argsort(slots), NUM_SLOTS), np.append(np.argsort(pages), num_pages)
    moved = dataclasses.replace(
        case,
        q=case.q[rows],
        k=case.k[pages],
        v=case.v[pages],
        page_ids=new_page[case.page_ids[slots]].astype(np.int32),
        slot=new_slot[case.slot[rows]].astype(np.int32),
        position=case.position[rows],
    )
    np.testing.assert_array_equal(moved.run(), expected[rows])


def test_bits_do_not_depend_on_how_long_a_sequence_may_become():
    """Extra columns of the page table, and the blocks that a longer row makes all others go through, change nothing."""
    case = make_case(7, 16, 2)
    expected = case.run()
    wider = np.pad(case.page_ids, ((0, 0), (0, 8)), constant_values=len(case.k))
    np.testing.assert_array_equal(dataclasses.replace(case, page_ids=wider).run(), expected)
    row = int(np.flatnonzero(case.slot == NUM_SLOTS)[0])
    wider[0, 5:13] = wider[0, 0]
    slot, position = case.slot.copy(), case.position.copy()
    slot[row], position[row] = 0, 13 * 16 - 1
    longer = dataclasses.replace(case, page_ids=wider, slot=slot, position=position).run()
    others = np.arange(NUM_ROWS) != row
    np.testing.assert_array_equal(longer[others], expected[others])
    assert longer[row].any()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_scores_of_any_size_neither_overflow_nor_lose_their_softmax(scale):
    case = make_case(8, 16, 2)
    case = dataclasses.replace(case, q=(case.q * scale).astype(np.float32))
    np.testing.assert_allclose(case.run(), dense(case), atol=2e-5)
