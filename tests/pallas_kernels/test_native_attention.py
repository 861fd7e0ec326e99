"""The promises of native attention and rotary writes alone: rows that share reads, rows in use, pages in place.

The cases of all backends are in test_decode_attention.py, test_chunk_attention.py and test_rotary_write.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import native
from pallas_kernels.native import library
from pallas_kernels.paged_attention import PagedKV, decode_attention
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.core.program_text import assert_in_place
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import NUM_SLOTS, Case, assert_close

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
make_case = functools.partial(cases.make_case, pages_per_slot=3, max_rows_per_slot=45)

ALL_SHAPES = {
    **SHAPES,
    "small": AttentionShape("small", 6, 2, 8, page_size=8, window=1, softcap=5.0, sinks=True),
    "group of 16, window in a page": AttentionShape("", 16, 1, 40, page_size=32, window=17),
    "group of 5, head_dim 6": AttentionShape("", 5, 1, 6, page_size=8, softcap=3.0),
}
shapes = pytest.mark.parametrize("name", ["llama-135m", "gpt-oss-20b", "gemma2-2b", *list(ALL_SHAPES)[len(SHAPES) :]])


@functools.cache
def _compiled(window: int | None, softcap: float | None):
    return jax.jit(functools.partial(native.paged_attention, window=window, softcap=softcap))


def run(case: Case, batch_size: int | None = None) -> np.ndarray:
    count = len(case.slot) if batch_size is None else batch_size
    attend = _compiled(case.shape.window, case.shape.softcap)
    return np.asarray(attend(*case.rows, sinks=case.options["sinks"], batch_size=np.int32(count)))


def take(case: Case, rows: np.ndarray) -> Case:
    return case.replace(q=case.q[rows], slot=case.slot[rows], position=case.position[rows])


@shapes
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_a_rows_bits_do_not_depend_on_the_rows_that_it_shares_reads_with(name, dtype):
    case = make_case(ALL_SHAPES[name], dtype, chunks=True)
    expected, number = run(case), len(case.slot)
    assert_close(expected, case)
    rng = np.random.default_rng(0)
    strewn, backwards = rng.permutation(number), np.arange(number)[::-1]
    alternating = np.argsort(np.arange(number) % 2, kind="stable")  # no two neighbours at consecutive positions
    shifted = np.roll(np.arange(number), 1)
    pairs = np.repeat(np.arange(number), 2)[:number]  # the same row twice
    for rows in (strewn, backwards, alternating, shifted, pairs):
        np.testing.assert_array_equal(run(take(case, rows)), expected[rows])


@shapes
def test_rows_in_use_have_the_same_bits_however_many_they_are(name):
    case = make_case(ALL_SHAPES[name], "bfloat16", chunks=True, seed=1)
    expected, number = run(case), len(case.slot)
    for batch_size in (-1, 0, 1, 2, 7, 8, 9, 31, number - 1, number, number + 9):
        used = max(batch_size, 0)
        rest = np.arange(number) >= used
        wild = case.replace(  # what the others hold is not looked at
            q=np.where(rest[:, None, None], np.float32(np.nan), case.q),
            slot=np.where(rest, -5, case.slot).astype(np.int32),
            position=np.where(rest, 10**9, case.position).astype(np.int32),
        )
        np.testing.assert_array_equal(run(wild, batch_size)[:used], expected[:used])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
def test_writes_stop_at_the_rows_in_use_and_take_narrow_norms(dtype):
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((9, 2, 8, 20)).astype(jnp.bfloat16).astype(jnp.float32)
    stored = pages.astype(jnp.bfloat16).view(np.uint16) if dtype == "uint16" else pages.astype(jnp.dtype(dtype))
    kv = PagedKV(stored, stored, np.arange(8, dtype=np.int32).reshape(4, 2))
    qkv = rng.standard_normal((16, 2, 5, 20)).astype(np.float32)
    cos, sin = (f(rng.uniform(-3, 3, (16, 10))).astype(np.float32) for f in (np.cos, np.sin))
    norms = [rng.uniform(0.5, 2, 20).astype(jnp.bfloat16) for _ in range(2)]
    slot, position = np.repeat(np.arange(4, dtype=np.int32), 4), np.tile(np.int32([7, 8, 0, 15]), 4)

    @jax.jit
    def write(q_norm, k_norm, batch_size):
        return native.rotary_write(
            qkv, cos, sin, kv, slot, position, q_norm=q_norm, k_norm=k_norm, batch_size=batch_size
        )

    all_rows = [np.asarray(array) for array in write(*norms, np.int32(16))]
    for wide, whole in zip(write(*(norm.astype(np.float32) for norm in norms), np.int32(16)), all_rows, strict=True):
        np.testing.assert_array_equal(np.asarray(wide), whole)
    for batch_size in (-1, 0, 1, 8, 9, 16, 99):
        q, *written = (np.asarray(array) for array in write(*norms, np.int32(batch_size)))
        used = min(max(batch_size, 0), 16)
        np.testing.assert_array_equal(q[:used], all_rows[0][:used])
        for pages, whole in zip(written, all_rows[1:], strict=True):
            expected = stored.copy()
            for row in range(used):
                page, offset = kv.page_ids[slot[row], position[row] // 8], position[row] % 8
                expected[page, :, offset] = whole[page, :, offset]
            np.testing.assert_array_equal(pages, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint16"])
def test_values_are_rounded_to_the_nearest_bfloat16_halves_to_even(dtype):
    halves = ((np.arange(0x7F7F, dtype=np.uint32) << 16) + 0x8000).view(np.float32)  # also between subnormal numbers
    values = np.concatenate(
        [halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(np.inf)), -halves]
    )
    largest = float(jnp.finfo(jnp.bfloat16).max)
    values = np.append(values, np.float32([0, -0.0, largest, 3.4e38, -3.4e38, np.inf, -np.inf])).astype(np.float32)
    values = np.resize(values, (-(-values.size // 64), 1, 1, 64))
    batch_size = len(values)
    qkv = np.concatenate([np.zeros((batch_size, 1, 2, 64), np.float32), values], axis=2)
    pages = np.zeros((-(-batch_size // 8), 1, 8, 64), jnp.dtype(dtype))
    kv = PagedKV(pages, pages, np.arange(len(pages), dtype=np.int32)[None])
    angles = np.zeros((batch_size, 32), np.float32)
    write = jax.jit(lambda qkv: native.rotary_write(qkv, angles, angles, kv, *where))
    where = np.zeros(batch_size, np.int32), np.arange(batch_size, dtype=np.int32)
    stored = np.asarray(write(qkv)[2]).view(np.uint16).reshape(-1, 64)[:batch_size]
    np.testing.assert_array_equal(stored, values[:, 0, 0].astype(jnp.bfloat16).view(np.uint16))
    broken = np.full_like(qkv, np.nan)
    broken.view(np.uint32)[:] += np.uint32(1) << np.arange(64, dtype=np.uint32) % 22  # not only the usual NaN
    assert np.isnan(
        np.asarray(write(broken)[2]).view(jnp.bfloat16).reshape(-1, 64)[:batch_size].astype(np.float32)
    ).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_pages_are_written_in_place_in_a_loop_that_attends(dtype):
    shape = (4099, 2, 8, 16)  # a prime: no other array has this length

    def loop(k, v, page_ids, qkv, angles):
        slot, position = jnp.arange(4, dtype=jnp.int32), jnp.zeros(4, jnp.int32)

        def body(index, carry):
            k, v, qkv = carry
            kv = PagedKV(k, v, page_ids)
            q, k, v = native.rotary_write(qkv, angles, angles, kv, slot, position + index)
            out = native.paged_attention(q, kv._replace(k=k, v=v), slot, position + index)
            return k, v, qkv + out.mean()

        return lax.fori_loop(0, 7, body, (k, v, qkv))

    arguments = [
        (shape, dtype),
        (shape, dtype),
        ((4, 3), jnp.int32),
        ((4, 2, 5, 16), jnp.float32),
        ((4, 8), jnp.float32),
    ]
    shapes = [jax.ShapeDtypeStruct(*argument) for argument in arguments]
    program = jax.jit(loop, donate_argnums=(0, 1)).lower(*shapes).compile()
    assert program.as_text().count("jaxserve_rotary_write") == 1
    assert_in_place(program, shape, shapes[0].size * shapes[0].dtype.itemsize, 2)
    kept = jax.jit(loop).lower(*shapes).compile()  # not donated: copied once
    with pytest.raises(AssertionError):
        assert_in_place(kept, shape, shapes[0].size * shapes[0].dtype.itemsize, 2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((34, 2, 64), "float32"), ((4, 2, 258), "float32"), ((4, 2, 64), "float16"), ((4, 2, 64), "int8")],
)
def test_what_native_attention_does_not_serve_is_refused_by_name_and_left_to_plain_jax_by_default(shape, dtype):
    case = make_case(AttentionShape("", *shape), dtype)
    with pytest.raises(ValueError, match="backend 'native' does not serve pages of .*; use 'reference'"):
        decode_attention(*case.rows, backend="native")
    assert_close(decode_attention(*case.rows), case)
    assert NUM_SLOTS in case.slot
