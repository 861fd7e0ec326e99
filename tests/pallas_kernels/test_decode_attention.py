"""Decode attention of every backend: against an oracle in float64, and the promises on bits. Kernels are interpreted."""

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
from pallas_kernels.paged_attention import PagedKV, decode_attention, triton_decode
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import NUM_SLOTS, Case, assert_close

NATIVE = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
BACKENDS = ["reference", "triton", "tpu", "native"]
COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "uint16": "bfloat16"}  # else float16
make_case = functools.partial(cases.make_case, pages_per_slot=3)

# Beside the heads of real models: the smallest page, head and window; more query heads than one program takes; padding.
ODD_SHAPES = {
    "small": AttentionShape("small", 6, 2, 8, page_size=8, window=1, softcap=5.0, sinks=True),
    "many heads": AttentionShape("many heads", 45, 1, 16, page_size=16, sinks=True),
    "wide heads": AttentionShape("wide heads", 3, 3, 144, page_size=32, window=40),
}
ALL_SHAPES = {**SHAPES, **ODD_SHAPES}
FEW_SHAPES = ["gemma2-2b", "gpt-oss-20b", "llama-135m", "small", "many heads"]

TPU_SHAPES = ["gemma2-2b", "gpt-oss-20b", "llama-135m", "small"]  # its interpreter is slow

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


few_shapes = pytest.mark.parametrize(("backend", "name"), backends_with(*zip(FEW_SHAPES)))


@functools.cache
def compiled(backend: str, window: int | None, softcap: float | None, num_splits: int | None):
    interpret = backend in ("triton", "tpu")
    options = {"window": window, "softcap": softcap, "num_splits": num_splits, "backend": backend}
    return jax.jit(functools.partial(decode_attention, **options, interpret=interpret))


def run(backend: str, case: Case, num_splits: int | None = 2) -> np.ndarray:
    run_rows = compiled(backend, case.shape.window, case.shape.softcap, num_splits)
    return np.asarray(run_rows(*case.rows, sinks=case.options["sinks"]))


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
        ("llama-135m", "float16"),
        ("qwen2-0.5b", "uint16"),
        ("gpt-oss-20b", "int8"),
        ("many heads", "float8_e4m3fn"),
        ("wide heads", "float8_e5m2"),
    ),
)
def test_pages_of_every_dtype(backend, name, dtype):
    case = make_case(ALL_SHAPES[name], dtype)
    out = run(backend, case)
    assert_close(out, case, compute_of(backend, dtype))
    np.testing.assert_array_equal(run(backend, case.poisoned()), out)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "small"])
@pytest.mark.parametrize("num_splits", [1, 3, 16])
def test_any_number_of_splits_also_more_than_there_are_tiles(name, num_splits):
    case = make_case(ALL_SHAPES[name], "float32")
    assert_close(run("triton", case, num_splits), case)
    np.testing.assert_array_equal(run("triton", case.poisoned(), num_splits), run("triton", case, num_splits))


@few_shapes
def test_a_rows_bits_do_not_depend_on_other_rows(backend, name):
    case = make_case(ALL_SHAPES[name], "bfloat16", seed=1)
    expected = run(backend, case)
    for row in np.flatnonzero(case.slot < NUM_SLOTS):
        alone = np.where(np.arange(len(case.slot)) == row, case.slot, NUM_SLOTS)
        np.testing.assert_array_equal(run(backend, case.replace(slot=alone))[row], expected[row])
        shorter = np.where(np.arange(len(case.slot)) == row, case.position, case.position // 3)
        np.testing.assert_array_equal(run(backend, case.replace(position=shorter))[row], expected[row])


@few_shapes
def test_bits_do_not_depend_on_places_of_rows_slots_and_pages(backend, name):
    case = make_case(ALL_SHAPES[name], "bfloat16", seed=2)
    rng, num_pages = np.random.default_rng(0), len(case.k)
    rows, slots, pages = (rng.permutation(size) for size in (len(case.slot), NUM_SLOTS, num_pages))
    new_slot, new_page = np.append(np.argsort(slots), NUM_SLOTS), np.append(np.argsort(pages), num_pages)
    moved = case.replace(
        q=case.q[rows],
        k=case.k[pages],
        v=case.v[pages],
        page_ids=new_page[case.page_ids[slots]].astype(np.int32),
        slot=new_slot[case.slot[rows]].astype(np.int32),
        position=case.position[rows],
    )
    np.testing.assert_array_equal(run(backend, moved), run(backend, case)[rows])


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
@pytest.mark.parametrize("num_splits", [1, 2])
def test_rows_without_a_slot_give_zero_whatever_their_position(backend, num_splits):
    case = make_case(ALL_SHAPES["small"], "float32")
    for position in (-1, 0, 10**6):
        nowhere = case.replace(
            slot=np.full_like(case.slot, NUM_SLOTS), position=np.full_like(case.position, position)
        ).poisoned()
        assert not run(backend, nowhere, num_splits).any()


@backends
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_scores_of_any_size_neither_overflow_nor_lose_their_softmax(backend, scale):
    case = make_case(ALL_SHAPES["llama-135m"], "float32", seed=3)
    case = case.replace(q=(case.q * scale).astype(np.float32))
    assert_close(run(backend, case), case)


@backends
def test_the_bound_tells_a_narrower_computation_and_wrong_operands(backend):
    case = make_case(ALL_SHAPES["gpt-oss-20b"], "bfloat16", seed=4)
    out, compute = run(backend, case), compute_of(backend, "bfloat16")
    if compute == "bfloat16":
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case, "float32")
    last_seen_moved = np.where(case.position > 0, case.position - 1, 0).astype(np.int32)
    for wrong in (
        {"position": last_seen_moved},
        {"v": np.roll(case.v, 1, axis=1)},
        {"k": np.roll(case.k, 1, axis=1)},
        {"page_ids": np.roll(case.page_ids, 1, axis=0)},
        {"sinks": None},
        {"shape": dataclasses.replace(case.shape, window=127)},
    ):
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(run(backend, case.replace(**wrong)), case, compute)


def test_splits_fill_the_gpu_and_are_no_more_than_the_longest_row_can_use():
    assert triton_decode.default_num_splits(num_programs=16 * 8, max_tiles=1000) == 4  # 396 programs wanted, 512 made
    assert triton_decode.default_num_splits(num_programs=64 * 8, max_tiles=1000) == 1
    assert triton_decode.default_num_splits(num_programs=8, max_tiles=1000) == 64
    assert triton_decode.default_num_splits(num_programs=8, max_tiles=63) == 8  # 4 tiles each
    assert triton_decode.default_num_splits(num_programs=1, max_tiles=3) == 1
    assert triton_decode.default_num_splits(num_programs=1, max_tiles=10**6) == 128  # the most there are


def attend(shape: AttentionShape, dtype: str = "float32", num_rows: int = 1, num_pages: int = 4, **options):
    pages = jax.ShapeDtypeStruct((num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    kv = PagedKV(pages, pages, int32((2, 2)))
    q = jax.ShapeDtypeStruct((num_rows, shape.num_heads, shape.head_dim), jnp.float32)
    jax.eval_shape(
        functools.partial(decode_attention, backend="triton", **options), q, kv, int32((num_rows,)), int32((num_rows,))
    )


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 2, 264), {}, "head_dim 264 is above 256: use backend 'reference'"),
        ((4, 3, 64), {}, "4 query heads are no multiple of 3 kv heads"),
        ((4, 2, 64, 24), {}, "page size 24 is no power of two of at least 8"),
        ((4, 2, 64, 4), {}, "page size 4 is no power of two of at least 8"),
        ((4, 2, 64), {"dtype": "int32"}, "pages of int32 are not supported: use one of float32, bfloat16"),
        ((4, 2, 64), {"num_splits": 0}, "num_splits 0 is not in 1..128"),
        ((4, 2, 64), {"num_splits": 129}, "num_splits 129 is not in 1..128"),
        ((4, 2, 64), {"num_rows": 65536}, "65536 batch rows are more than 65535"),
        ((4, 2, 64), {"num_pages": 2**19}, "a pool array of 4294967296 elements exceeds 2147483648"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        attend(AttentionShape("", *shape), **options)


def test_an_unknown_backend_and_pages_that_differ_are_refused():
    case = make_case(ALL_SHAPES["small"], "float32")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        decode_attention(*case.rows, backend="cuda")
    for kv, message in (
        (case.kv._replace(v=case.kv.v.astype(jnp.bfloat16)), "make them alike"),
        (PagedKV(case.kv.k[..., :4], case.kv.v[..., :4], case.kv.page_ids), "head_dim of queries is 8, of pages 4"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(jnp.asarray(case.q), kv, *case.rows[2:], backend="triton", interpret=True)


def test_8_bit_floats_that_a_gpu_cannot_convert_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match="compute capability 8.9 or more, this one has 8.0: use float8_e5m2 or int8"):
        attend(AttentionShape("", 4, 2, 64), "float8_e4m3fn")
    attend(AttentionShape("", 4, 2, 64), "float8_e5m2")


def lowered_for_cuda(case: Case, num_splits: int) -> str:
    """StableHLO for an NVIDIA GPU, made without one."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    options = {**case.options, "num_splits": num_splits, "backend": "triton"}
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.rows, options.pop("sinks")))

    def attention(rows, sinks):
        return decode_attention(*rows, sinks=sinks, **options)

    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        traced = jax.jit(attention).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("name", "dtype", "element"),
    [
        ("llama3-8b", "bfloat16", "bf16"),
        ("gemma2-2b", "float8_e4m3fn", "f8E4M3FN"),
        ("gpt-oss-20b", "int8", "i8"),
        ("qwen2-0.5b", "uint16", "bf16"),
        ("small", "float32", "f32"),
        ("wide heads", "float16", "f16"),
    ],
)
def test_it_lowers_to_triton_kernels_that_read_the_pool_as_it_is(name, dtype, element, num_splits):
    case = make_case(ALL_SHAPES[name], dtype)
    text = lowered_for_cuda(case, num_splits)
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert len(calls) == (1 if num_splits == 1 else 2)
    pool = f"tensor<{'x'.join(map(str, case.k.shape))}x{element}>"
    assert calls[0].count(pool) == 2
    others = {"stablehlo.bitcast_convert"} if dtype == "uint16" else set()
    assert set(re.findall(r"stablehlo\.\w+", text)) == {"stablehlo.custom_call"} | others
