"""Chunk attention of every backend: against an oracle in float64, and the promises on bits. Kernels are interpreted."""

import dataclasses
import functools
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.paged_attention import PagedKV, chunk_attention, triton_chunk
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import NUM_SLOTS, Case, assert_close

NATIVE = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
BACKENDS = ["reference", "triton", "tpu", "native"]
COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "uint16": "bfloat16"}  # else float16
make_case = functools.partial(cases.make_case, chunks=True, pages_per_slot=3, max_rows_per_slot=45)

# Beside the heads of real models: the smallest page, head and window; more query heads than a block has; padding; tiles that
# every row sees whole, between two edges of a window.
ODD_SHAPES = {
    "small": AttentionShape("small", 6, 2, 8, page_size=8, window=1, softcap=5.0, sinks=True),
    "many heads": AttentionShape("many heads", 140, 1, 16, page_size=16, sinks=True),
    "wide heads": AttentionShape("wide heads", 3, 1, 144, page_size=32, window=40),
    "long window": AttentionShape("long window", 8, 1, 32, page_size=128, window=250, softcap=20.0, sinks=True),
}
ALL_SHAPES = {**SHAPES, **ODD_SHAPES}

TPU_SHAPES = ["llama-135m", "small", "wide heads"]  # its interpreter is slow

backends = pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=NATIVE if backend == "native" else ()) for backend in BACKENDS]
)


def backends_with(*cases: tuple):
    """Every backend with every case of a shape's name and more, if it has it."""
    return [
        pytest.param(backend, *case, marks=NATIVE if backend == "native" else ())
        for case in cases
        for backend in BACKENDS
        if has(backend, *case)
    ]


def has(backend: str, name: str, *dtype: str) -> bool:
    """Whether the backend has a shape and a dtype; of "tpu", whether it is to be tested."""
    if backend == "tpu":
        return name in TPU_SHAPES and "float16" not in dtype
    return backend != "native" or (name != "many heads" and not set(dtype) - {"float32", "bfloat16", "uint16"})


@functools.cache
def compiled(backend: str, window: int | None, softcap: float | None):
    options = {"window": window, "softcap": softcap, "backend": backend, "interpret": backend in ("triton", "tpu")}
    return jax.jit(functools.partial(chunk_attention, **options))


def run(backend: str, case: Case) -> np.ndarray:
    return np.asarray(compiled(backend, case.shape.window, case.shape.softcap)(*case.rows, sinks=case.options["sinks"]))


def compute_of(backend: str, dtype: str) -> str:
    """What the backend rounds operands of products to."""
    if backend in ("reference", "native") or dtype == "float32":
        return "float32"
    return "bfloat16" if backend == "tpu" else COMPUTE.get(dtype, "float16")


@pytest.mark.parametrize(("backend", "name"), backends_with(*zip(ALL_SHAPES)))
def test_it_is_softmax_attention_to_the_positions_that_a_row_sees_and_to_nothing_else(backend, name):
    case = make_case(ALL_SHAPES[name], "bfloat16")
    out = run(backend, case)
    assert_close(out, case, compute_of(backend, "bfloat16"))
    assert NUM_SLOTS in case.slot
    assert not out[case.slot == NUM_SLOTS].any()
    np.testing.assert_array_equal(run(backend, case.poisoned()), out)


@pytest.mark.parametrize(
    ("backend", "name", "dtype"),
    backends_with(
        ("small", "float32"),
        ("many heads", "float32"),
        ("llama-135m", "float16"),
        ("qwen2-0.5b", "uint16"),
        ("gpt-oss-20b", "int8"),
        ("long window", "float8_e4m3fn"),
        ("wide heads", "float8_e5m2"),
    ),
)
def test_pages_of_every_dtype(backend, name, dtype):
    case = make_case(ALL_SHAPES[name], dtype)
    out = run(backend, case)
    assert_close(out, case, compute_of(backend, dtype))
    np.testing.assert_array_equal(run(backend, case.poisoned()), out)


def rows_of(case: Case, rows: np.ndarray, num_rows: int) -> Case:
    """Only these rows, in this order (-1: a row without a slot), and others without a slot up to `num_rows`."""
    rows = np.concatenate([rows, np.full(num_rows - len(rows), -1)]).astype(int)
    return case.replace(
        q=case.q[rows], slot=np.where(rows < 0, NUM_SLOTS, case.slot[rows]), position=case.position[rows]
    )


@pytest.mark.parametrize(
    ("backend", "name", "dtype"),
    backends_with(
        ("llama-135m", "bfloat16"),
        ("wide heads", "float32"),
        ("many heads", "float16"),
        ("long window", "bfloat16"),
        ("long window", "float8_e4m3fn"),
    ),
)
def test_a_rows_bits_do_not_depend_on_where_its_prompt_was_cut_nor_on_the_rows_beside_it(backend, name, dtype):
    case = make_case(ALL_SHAPES[name], dtype, max_rows_per_slot=90)
    expected, num_rows = run(backend, case), len(case.slot)
    runs = [np.flatnonzero(case.slot == slot) for slot in np.unique(case.slot[case.slot < NUM_SLOTS])]
    longest = max(runs, key=len)
    assert len(longest) > triton_chunk.block_rows(case.shape.group_size)
    pieces = [(longest[start : start + 64], 0) for start in range(0, len(longest), 64)]
    pieces += [(longest[start : start + 7], 3) for start in (1, len(longest) - 7)]
    pieces += [(longest[start : start + 1], 1) for start in (0, 31, 32, len(longest) - 1)]
    for rows, num_before in pieces:
        alone = rows_of(case, np.concatenate([np.full(num_before, -1), rows]), num_rows)
        np.testing.assert_array_equal(run(backend, alone)[num_before : num_before + len(rows)], expected[rows])
    shorter = [rows[-(1 + 9 * index) :] for index, rows in enumerate(runs)]
    for packed in (np.concatenate(runs[::-1]), np.concatenate(shorter)):
        np.testing.assert_array_equal(run(backend, rows_of(case, packed, num_rows))[: len(packed)], expected[packed])


@pytest.mark.parametrize(("backend", "name"), backends_with(*zip(["gpt-oss-20b", "llama-135m"])))
def test_bits_do_not_depend_on_places_of_slots_and_pages(backend, name):
    case = make_case(ALL_SHAPES[name], "bfloat16", seed=2)
    rng, num_pages = np.random.default_rng(0), len(case.k)
    slots, pages = (rng.permutation(size) for size in (NUM_SLOTS, num_pages))
    new_slot, new_page = np.append(np.argsort(slots), NUM_SLOTS), np.append(np.argsort(pages), num_pages)
    moved = case.replace(
        k=case.k[pages],
        v=case.v[pages],
        page_ids=new_page[case.page_ids[slots]].astype(np.int32),
        slot=new_slot[case.slot].astype(np.int32),
    )
    np.testing.assert_array_equal(run(backend, moved), run(backend, case))


@pytest.mark.parametrize("broken_number", [np.nan, np.inf])
@pytest.mark.parametrize(("backend", "name"), backends_with(*zip(["llama-135m", "long window"])))
def test_a_row_is_reached_by_what_it_sees_and_not_by_the_keys_and_values_of_later_rows(backend, name, broken_number):
    """One position is broken: rows before it, and rows whose window it left, keep their bits; the others show it."""
    case = make_case(ALL_SHAPES[name], "bfloat16", max_rows_per_slot=300)
    rows, expected = np.flatnonzero(case.slot == 0), run(backend, case)
    window, page_size = case.shape.window or 10**6, case.shape.page_size
    for broken_position in (70, 75, 300):
        if broken_position > case.position[rows].max():
            continue
        page, offset = case.page_ids[0, broken_position // page_size], broken_position % page_size
        broken = {"k": case.k.copy(), "v": case.v.copy()}
        for array in broken.values():
            array[page, :, offset, 3] = broken_number
        after = case.position[rows] - broken_position
        sees = (after >= 0) & (after < window)
        assert sees.any()
        assert not sees.all()
        for wrong in (broken, {"v": broken["v"]}):
            out = run(backend, case.replace(**wrong))
            assert not np.isfinite(out[rows[sees]]).all(axis=2).any()
            np.testing.assert_array_equal(out[rows[~sees]], expected[rows[~sees]])


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize(("backend", "name"), backends_with(*zip(["llama-135m", "gpt-oss-20b"])))
def test_a_nan_that_a_row_sees_is_not_hidden(backend, where, name):
    case = make_case(ALL_SHAPES[name], "bfloat16")
    row = int(np.flatnonzero(case.slot == 2)[0])  # of a slot of one position
    broken = getattr(case, where).copy()
    broken[(row, 0, 0) if where == "q" else (case.page_ids[2, 0], 0, 0, 0)] = np.nan
    out = run(backend, case.replace(**{where: broken}))
    assert np.isnan(out[row, 0]).any()
    assert not np.isnan(out[case.slot != 2]).any()


@backends
def test_rows_without_a_slot_give_zero_whatever_their_position(backend):
    case = make_case(ALL_SHAPES["small"], "float32")
    for position in (-1, 0, 10**6):
        nowhere = case.replace(
            slot=np.full_like(case.slot, NUM_SLOTS), position=np.full_like(case.position, position)
        ).poisoned()
        assert not run(backend, nowhere).any()


@backends
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_scores_of_any_size_neither_overflow_nor_lose_their_softmax(backend, scale):
    case = make_case(ALL_SHAPES["llama-135m"], "float32", seed=3)
    case = case.replace(q=(case.q * scale).astype(np.float32))
    assert_close(run(backend, case), case)


@backends
def test_the_bound_tells_a_narrower_computation_and_wrong_operands(backend):
    case = make_case(ALL_SHAPES["long window"], "bfloat16", seed=4)
    out, compute = run(backend, case), compute_of(backend, "bfloat16")
    if compute == "bfloat16":
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case, "float32")
    for wrong in (
        {"v": np.roll(case.v, 1, axis=2)},
        {"k": np.roll(case.k, 1, axis=2)},
        {"page_ids": np.where(case.page_ids < len(case.k), (case.page_ids + 1) % len(case.k), len(case.k))},
        {"position": np.maximum(case.position - 1, 0)},
        {"sinks": None},
        {"shape": dataclasses.replace(case.shape, window=249)},
        {"shape": dataclasses.replace(case.shape, softcap=None)},
    ):
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case.replace(**wrong), compute)


def test_a_block_has_128_queries_or_one_row_of_more():
    assert [triton_chunk.block_rows(group_size) for group_size in (1, 3, 4, 7, 64, 128, 140)] == [
        128,
        32,
        32,
        16,
        2,
        1,
        1,
    ]


def attend(shape: AttentionShape, dtype: str = "float32", num_pages: int = 4):
    pages = jax.ShapeDtypeStruct((num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((2, shape.num_heads, shape.head_dim), jnp.float32)
    kv = PagedKV(pages, pages, int32((2, 2)))
    jax.eval_shape(functools.partial(chunk_attention, backend="triton"), q, kv, int32((2,)), int32((2,)))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 2, 264), {}, "head_dim 264 is above 256: use backend 'reference'"),
        ((4, 3, 64), {}, "4 query heads are no multiple of 3 kv heads"),
        ((4, 2, 64, 24), {}, "page size 24 is no power of two of at least 8"),
        ((4, 2, 64, 4), {}, "page size 4 is no power of two of at least 8"),
        ((4, 2, 64), {"dtype": "int32"}, "pages of int32 are not supported: use one of float32, bfloat16"),
        ((4, 2, 64), {"num_pages": 2**19}, "a pool array of 4294967296 elements exceeds 2147483648"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        attend(AttentionShape("", *shape), **options)


def test_an_unknown_backend_and_pages_that_differ_are_refused():
    case = make_case(ALL_SHAPES["small"], "float32")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        chunk_attention(*case.rows, backend="cuda")
    for kv, message in (
        (case.kv._replace(v=case.kv.v.astype(jnp.bfloat16)), "make them alike"),
        (PagedKV(case.kv.k[..., :4], case.kv.v[..., :4], case.kv.page_ids), "head_dim of queries is 8, of pages 4"),
    ):
        with pytest.raises(ValueError, match=message):
            chunk_attention(jnp.asarray(case.q), kv, *case.rows[2:], backend="triton", interpret=True)


def test_8_bit_floats_that_a_gpu_cannot_convert_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match="compute capability 8.9 or more, this one has 8.0: use float8_e5m2 or int8"):
        attend(AttentionShape("", 4, 2, 64), "float8_e4m3fn")
    attend(AttentionShape("", 4, 2, 64), "float8_e5m2")


def lowered_for_cuda(case: Case) -> str:
    """StableHLO for an NVIDIA GPU, made without one."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    options = {**case.options, "backend": "triton"}
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.rows, options.pop("sinks")))

    def attention(rows, sinks):
        return chunk_attention(*rows, sinks=sinks, **options)

    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        traced = jax.jit(attention).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "dtype", "element"),
    [
        ("llama3-8b", "bfloat16", "bf16"),
        ("gemma2-2b", "float8_e4m3fn", "f8E4M3FN"),
        ("gpt-oss-20b", "int8", "i8"),
        ("qwen2-0.5b", "uint16", "bf16"),
        ("small", "float32", "f32"),
        ("wide heads", "float16", "f16"),
        ("many heads", "float8_e5m2", "f8E5M2"),
    ],
)
def test_it_lowers_to_one_triton_kernel_that_reads_the_pool_as_it_is(name, dtype, element):
    case = make_case(ALL_SHAPES[name], dtype)
    text = lowered_for_cuda(case)
    (call,) = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    pool = f"tensor<{'x'.join(map(str, case.k.shape))}x{element}>"
    assert call.count(pool) == 2
    readers = [line for line in text.splitlines() if pool in line and "func.func" not in line]
    assert len(readers) == (3 if dtype == "uint16" else 1)
    assert all(re.search(r"stablehlo\.(custom_call|bitcast_convert)", line) for line in readers)
