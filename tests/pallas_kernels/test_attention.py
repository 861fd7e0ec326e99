"""The promises that decode and chunk attention share, for every backend: against an oracle in float64, and on bits.

Kernels are interpreted. What only one of the operations promises is in test_decode_attention.py and test_chunk_attention.py.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.shapes import AttentionShape
from tests.pallas_kernels.attention_operations import (
    CHUNK,
    DECODE,
    OPERATIONS,
    arguments_of,
    compute_of,
    lowered_for_cuda,
)
from tests.pallas_kernels.cases import NUM_SLOTS, assert_close

operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def with_backends(*cases: tuple, decode: tuple = (), chunk: tuple = ()):
    """Both operations with every backend and case, and cases of one operation only."""
    return [
        *DECODE.with_backends(*cases, *decode),
        *CHUNK.with_backends(*cases, *chunk),
    ]


def names(*cases: str) -> list[tuple[str]]:
    return [(case,) for case in cases]


on_one_shape = {
    name: pytest.mark.parametrize(("operation", "backend", "name"), with_backends((name,)))
    for name in ("small", "llama-135m")
}


@pytest.mark.parametrize(
    ("operation", "backend", "name"),
    [*DECODE.with_backends(*names(*DECODE.shapes)), *CHUNK.with_backends(*names(*CHUNK.shapes))],
)
def test_it_is_softmax_attention_to_the_positions_that_a_row_sees_and_to_nothing_else(operation, backend, name):
    case = operation.case(name, "bfloat16")
    out = operation.run(backend, case)
    assert_close(out, case, compute_of(backend, "bfloat16"))
    assert NUM_SLOTS in case.slot
    assert not out[case.slot == NUM_SLOTS].any()
    np.testing.assert_array_equal(operation.run(backend, case.poisoned()), out)


@pytest.mark.parametrize(
    ("operation", "backend", "name", "dtype"),
    with_backends(
        ("small", "float32"),
        ("llama-135m", "float16"),
        ("qwen2-0.5b", "uint16"),
        ("gpt-oss-20b", "int8"),
        ("wide heads", "float8_e5m2"),
        decode=(("many heads", "float8_e4m3fn"),),
        chunk=(("many heads", "float32"), ("long window", "float8_e4m3fn")),
    ),
)
def test_pages_of_every_dtype(operation, backend, name, dtype):
    case = operation.case(name, dtype)
    out = operation.run(backend, case)
    assert_close(out, case, compute_of(backend, dtype))
    np.testing.assert_array_equal(operation.run(backend, case.poisoned()), out)


@pytest.mark.parametrize(
    ("operation", "backend", "name"),
    with_backends(("gpt-oss-20b",), ("llama-135m",), decode=names("gemma2-2b", "small", "many heads")),
)
def test_bits_do_not_depend_on_places_of_slots_and_pages_nor_of_single_rows(operation, backend, name):
    case = operation.case(name, "bfloat16", seed=2)
    rng, num_pages, num_rows = np.random.default_rng(0), len(case.k), len(case.slot)
    rows = rng.permutation(num_rows) if operation is DECODE else np.arange(num_rows)  # chunks must stay together
    slots, pages = (rng.permutation(size) for size in (NUM_SLOTS, num_pages))
    new_slot, new_page = np.append(np.argsort(slots), NUM_SLOTS), np.append(np.argsort(pages), num_pages)
    moved = case.replace(
        q=case.q[rows],
        k=case.k[pages],
        v=case.v[pages],
        page_ids=new_page[case.page_ids[slots]].astype(np.int32),
        slot=new_slot[case.slot[rows]].astype(np.int32),
        position=case.position[rows],
    )
    np.testing.assert_array_equal(operation.run(backend, moved), operation.run(backend, case)[rows])


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize(("operation", "backend", "name"), with_backends(("llama-135m",), ("gpt-oss-20b",)))
def test_a_nan_that_a_row_sees_is_not_hidden(operation, backend, name, where):
    case = operation.case(name, "bfloat16")
    row = int(np.flatnonzero(case.slot == 2)[0])  # of a slot of one position
    broken = getattr(case, where).copy()
    broken[(row, 0, 0) if where == "q" else (case.page_ids[2, 0], 0, 0, 0)] = np.nan
    out = operation.run(backend, case.replace(**{where: broken}))
    assert np.isnan(out[row, 0]).any()
    assert not np.isnan(out[case.slot != 2]).any()


@on_one_shape["small"]
def test_rows_without_a_slot_give_zero_whatever_their_position(operation, backend, name):
    case = operation.case(name, "float32")
    for options in [{"num_splits": 1}, {}] if operation is DECODE else [{}]:
        for position in (-1, 0, 10**6):
            nowhere = case.replace(
                slot=np.full_like(case.slot, NUM_SLOTS), position=np.full_like(case.position, position)
            ).poisoned()
            assert not operation.run(backend, nowhere, **options).any()


@on_one_shape["llama-135m"]
def test_scores_of_any_size_neither_overflow_nor_lose_their_softmax(operation, backend, name):
    for scale in (1e-3, 30.0):
        case = operation.case(name, "float32", seed=3)
        case = case.replace(q=(case.q * scale).astype(np.float32))
        assert_close(operation.run(backend, case), case)


@pytest.mark.parametrize(
    ("operation", "backend", "name"),
    with_backends(decode=names("gpt-oss-20b"), chunk=names("llama-135m", "long window")),
)
def test_the_bound_tells_a_narrower_computation_and_wrong_operands(operation, backend, name):
    case = operation.case(name, "bfloat16", seed=2 if name == "gpt-oss-20b" else 0)
    out, compute = operation.run(backend, case), compute_of(backend, "bfloat16")
    if compute == "bfloat16":
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case, "float32")
    page_ids, num_pages = case.page_ids, len(case.k)
    wrong = [
        {"v": np.roll(case.v, 1, axis=2)},
        {"k": np.roll(case.k, 1, axis=2)},
        {"page_ids": np.where(page_ids < num_pages, (page_ids + 1) % num_pages, num_pages)},
        {"position": np.maximum(case.position - 1, 0)},
    ]
    if case.shape.num_kv_heads > 1:
        wrong += [{"v": np.roll(case.v, 1, axis=1)}, {"k": np.roll(case.k, 1, axis=1)}]
    if case.shape.sinks:
        wrong += [{"sinks": None}]
    if case.shape.window is not None:
        wrong += [{"shape": dataclasses.replace(case.shape, window=case.shape.window - 1)}]
    if case.shape.softcap is not None:
        wrong += [{"shape": dataclasses.replace(case.shape, softcap=None)}]
    for change in wrong:
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case.replace(**change), compute)


ALL, GPU, TPU = ("triton", "tpu"), ("triton",), ("tpu",)
REFUSALS = [
    (ALL, (4, 2, 264), {}, "head_dim 264 is above 256: use backend 'reference'"),
    (ALL, (4, 3, 64), {}, "4 query heads are no multiple of 3 kv heads"),
    (ALL, (4, 2, 64, 24), {}, "page size 24 is no power of two of at least 8"),
    (ALL, (4, 2, 64, 4), {}, "page size 4 is no power of two of at least 8"),
    (GPU, (4, 2, 64), {"dtype": "int32"}, "pages of int32 are not supported: use one of float32, bfloat16"),
    (GPU, (4, 2, 64), {"num_pages": 2**19}, "a pool array of 4294967296 elements exceeds 2147483648"),
    (TPU, (4, 2, 64), {"dtype": "int32"}, "pages of int32 are not supported on TPUs: use one of float32, bfloat16"),
    (TPU, (4, 2, 64), {"dtype": "float16"}, "pages of float16 are not supported on TPUs: use one of float32"),
    (TPU, (4, 2, 64), {"pages_per_slot": 2**17}, r"a page table of \[2, 131072\] and \d+ .* use larger pages"),
]


@operations
@pytest.mark.parametrize(
    ("backend", "shape", "sizes", "message"), [(backend, *case) for backends, *case in REFUSALS for backend in backends]
)
def test_what_a_kernel_cannot_do_is_refused(operation, backend, shape, sizes, message):
    attend = functools.partial(operation.function, backend=backend)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, *arguments_of(AttentionShape("", *shape), **sizes))


@operations
def test_an_unknown_backend_and_pages_that_differ_are_refused(operation):
    case = operation.case("small", "float32")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        operation.function(*case.rows, backend="cuda")
    for kv, message in (
        (case.kv._replace(v=case.kv.v.astype(jnp.bfloat16)), "make them alike"),
        (PagedKV(case.kv.k[..., :4], case.kv.v[..., :4], case.kv.page_ids), "head_dim of queries is 8, of pages 4"),
    ):
        for backend in ("triton", "tpu"):
            with pytest.raises(ValueError, match=message):
                operation.function(jnp.asarray(case.q), kv, *case.rows[2:], backend=backend, interpret=True)


@operations
def test_8_bit_floats_that_a_gpu_cannot_convert_are_refused(operation, monkeypatch):
    attend, shape = functools.partial(operation.function, backend="triton"), AttentionShape("", 4, 2, 64)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match="compute capability 8.9 or more, this one has 8.0: use float8_e5m2 or int8"):
        jax.eval_shape(attend, *arguments_of(shape, "float8_e4m3fn"))
    jax.eval_shape(attend, *arguments_of(shape, "float8_e5m2"))


@pytest.mark.parametrize(
    ("operation", "num_splits"),
    [(DECODE, 1), (DECODE, 4), (CHUNK, None)],
    ids=["decode, 1 split", "decode, 4 splits", "chunk"],
)
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
def test_it_lowers_to_triton_kernels_that_read_the_pool_as_it_is(operation, num_splits, name, dtype, element):
    case = operation.case(name, dtype)
    text = lowered_for_cuda(operation, case, **({} if num_splits is None else {"num_splits": num_splits}))
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert len(calls) == (2 if num_splits == 4 else 1)
    pool = f"tensor<{'x'.join(map(str, case.k.shape))}x{element}>"
    assert calls[0].count(pool) == 2
    readers = [line for line in text.splitlines() if pool in line and "func.func" not in line]
    assert len(readers) == (3 if dtype == "uint16" else 1)
    assert all(re.search(r"stablehlo\.(custom_call|bitcast_convert)", line) for line in readers)
    if operation is DECODE:  # nothing is computed beside the kernels
        others = {"stablehlo.bitcast_convert"} if dtype == "uint16" else set()
        assert set(re.findall(r"stablehlo\.\w+", text)) == {"stablehlo.custom_call"} | others
