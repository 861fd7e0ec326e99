"""Weights in int8: how they are rounded and packed. Products with them are in test_native_product.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.native import library

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

_UNIT = 2.0**-24  # largest relative error of rounding to float32
quantize = jax.jit(native.quantize)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Columns of sizes from 1e-4 to 1e4."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-4, 4, shape[1:])).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (300, 65)])
def test_a_weight_is_off_by_half_a_scale_at_most_and_the_scale_is_the_smallest_that_serves(shape, dtype):
    w = random(*shape).astype(jnp.dtype(dtype))
    q, scale = map(np.asarray, quantize(w))
    assert (q.dtype, scale.dtype) == (np.int8, np.float32)
    w, q, scale = (array.astype(np.float64) for array in (w, q, scale))
    np.testing.assert_allclose(scale, np.abs(w).max(axis=0) / 127, rtol=2 * _UNIT)
    assert (np.abs(q).max(axis=0) == 127).all()
    # The quotient errs by 2 units of up to 127; beside a half that may tell between two integers.
    assert (np.abs(q * scale - w) <= scale * (0.5 + 4 * 127 * _UNIT)).all()
    assert (q * w >= 0).all()


def test_integers_times_a_power_of_two_come_back_as_they_are():
    rng = np.random.default_rng(1)
    q = rng.integers(-127, 128, (50, 70)).astype(np.int8)
    q[0] = rng.choice([-127, 127], 70)
    scale = np.float32(2.0) ** rng.integers(-20, 20, 70)
    found, of_column = quantize(q * scale.astype(np.float32))
    np.testing.assert_array_equal(found, q)
    np.testing.assert_array_equal(of_column, scale)


def test_halves_go_to_the_even_integer():
    w = np.array([[127, -127], [0.5, -0.5], [1.5, -1.5], [2.5, -2.5]], np.float32)
    np.testing.assert_array_equal(quantize(w)[0][1:], [[0, 0], [2, -2], [2, -2]])


def test_columns_of_zeros_and_of_the_smallest_numbers_give_zeros():
    w = np.zeros((9, 3), np.float32)
    w[:, 1], w[:, 2] = 1e-45, 1
    _, scale = map(np.asarray, quantize(w))
    assert scale[0] == 0 and scale[1] < 1e-38 and scale[2] > 0
    out = np.asarray(native.product(jnp.ones((2, 9)), native.pack_int8(jnp.asarray(w)), num_columns=3))
    np.testing.assert_allclose(out, [[0, 0, 9]] * 2, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_a_weight_that_is_not_finite_takes_part_in_is_not_a_number(bad):
    w = random(31, 70)
    w[3, 5] = bad
    packed = native.pack_int8(jnp.asarray(w))
    for x in (jnp.ones((2, 31)), jnp.zeros((20, 31))):
        out = np.asarray(native.product(x, packed, num_columns=70))
        assert np.isnan(out[:, 5]).all() and np.isfinite(np.delete(out, 5, axis=1)).all()
    rows = np.asarray(native.embed(packed, jnp.array([5, 6], jnp.int32), 31))
    assert np.isnan(rows[0]).all() and np.isfinite(rows[1]).all()


def unpacked(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers [K, N] and scales [N], with what fills them up."""
    num_panels = packed.shape[0]
    scales = packed[:, :2].reshape(num_panels, -1).view(np.float32).reshape(-1)
    return packed[:, 2:].transpose(1, 3, 0, 2).reshape(-1, 64 * num_panels), scales


@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 64), (8, 65)])
def test_packing_keeps_every_number_and_fills_up_with_zeros(k, n):
    w = random(k, n)
    q, scale = quantize(w)
    packed = np.asarray(native.pack_int8(jnp.asarray(w)))
    assert packed.shape == (-(-n // 64), 2 + -(-k // 2), 64, 2) and packed.dtype == np.int8
    whole, scales = unpacked(packed)
    np.testing.assert_array_equal(whole[:k, :n], q)
    np.testing.assert_array_equal(scales[:n], scale)
    assert not whole[k:].any() and not whole[:, n:].any() and not scales[n:].any()


def test_of_a_gated_weight_16_columns_of_each_half_alternate():
    w = random(7, 2, 37)
    q, scale = quantize(w.reshape(7, -1))
    whole, scales = unpacked(np.asarray(native.pack_int8_gated(jnp.asarray(w))))
    for half in range(2):
        part, of_part = (array.reshape(len(array), -1, 2, 16)[:, :, half] for array in (whole, scales[None]))
        np.testing.assert_array_equal(part.reshape(len(whole), -1)[:7, :37], q[:, half * 37 : half * 37 + 37])
        np.testing.assert_array_equal(of_part.reshape(-1)[:37], scale[half * 37 : half * 37 + 37])


@pytest.mark.parametrize("size", [1, 31, 64])
def test_an_embedding_is_a_column_times_its_scale(size):
    table = random(size, 77).T
    q, scale = map(np.asarray, quantize(table.T))
    ids = np.array([0, 76, 15, 16, 63, 64, 5, 5, -4], np.int32)
    out = np.asarray(native.embed(native.pack_int8(jnp.asarray(table.T)), ids, size))
    expected = q.T.astype(np.float32) * scale[:, None]
    np.testing.assert_array_equal(out, expected[np.maximum(ids, 0)])


def test_a_table_that_is_not_packed_for_the_rows_is_refused():
    packed = native.pack_int8(jnp.asarray(random(8, 77)))
    for table, size in ((jnp.zeros((77, 8), jnp.int8), 8), (packed, 10), (jnp.zeros((77, 8), jnp.bfloat16), 9)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="neither a table of such rows nor packed"):
            jax.block_until_ready(native.embed(table, np.zeros(3, np.int32), size))
