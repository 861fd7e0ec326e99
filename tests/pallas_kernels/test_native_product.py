"""The native product: against an oracle in float64, and the promises on bits; packing and the embedding lookup."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from jaxserve.models.layers import RMSNorm, matmul
from pallas_kernels import native
from pallas_kernels.native import library

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

_UNIT = 2.0**-24  # largest relative error of rounding to float32
_SMALLEST = 2.0**-126  # normal number of float32 and bfloat16; vdpbf16ps takes smaller ones for zero
NUM_ROWS, EPS = 40, 1e-5
OPTIONS = [
    frozenset(name for name, there in zip(("norm", "bias", "residual", "gated"), chosen, strict=True) if there)
    for chosen in itertools.product([False, True], repeat=4)
]
PLAIN, ALL = frozenset(), frozenset(("norm", "bias", "residual"))
# K and N odd and even, smaller than a vector, one column more than some, and columns enough for many items of work.
SHAPES = [(1, 1), (2, 15), (64, 33), (129, 1300)]
CASES = [(31, 40, options) for options in OPTIONS]
CASES += [(*shape, options) for shape in SHAPES for options in (PLAIN, ALL, ALL | {"gated"})]
cases = pytest.mark.parametrize(
    ("k", "n", "options"), CASES, ids=[f"{k}x{n}-{'-'.join(sorted(options)) or 'plain'}" for k, n, options in CASES]
)
floats = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands as they are before they are packed. Arrays are NumPy's. An int8 weight is float32 before it is quantised."""

    x: np.ndarray  # [B, K]
    w: np.ndarray  # [K, N], or [K, 2, F]: gated
    scale: np.ndarray | None  # [K], in the weight's dtype, as the bias
    bias: np.ndarray | None  # [N], or [2, F]
    residual: np.ndarray | None  # [B, N], or [B, F]
    dtype: str  # of the weight

    def replace(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def take(self, rows: np.ndarray) -> "Case":
        return self.replace(x=self.x[rows], residual=None if self.residual is None else self.residual[rows])


@functools.cache
def make_case(k: int, n: int, options: frozenset[str], dtype: str, seed: int = 0) -> Case:
    """Rows of sizes from 0.01 to 100."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    width = (2, n) if "gated" in options else (n,)
    loaded = jnp.dtype("float32" if dtype == "int8" else dtype)
    return Case(
        x=random(NUM_ROWS, k) * np.exp(2 * random(NUM_ROWS, 1)),
        w=random(k, *width).astype(loaded),
        scale=random(k).astype(loaded) if "norm" in options else None,
        bias=random(*width).astype(loaded) if "bias" in options else None,
        residual=random(NUM_ROWS, n) if "residual" in options else None,
        dtype=dtype,
    )


@functools.partial(jax.jit, static_argnames=("dtype", "packed"))
def _product(x, w, scale, bias, residual, batch_size, *, dtype: str, packed: bool):
    """By the kernel, or by plain JAX."""
    gated, num_columns = w.ndim == 3, w.shape[-1]
    bias = None if bias is None else bias.reshape(-1)
    if packed:
        options: dict[str, Any] = {
            "scale": scale,
            "eps": EPS,
            "bias": bias,
            "residual": residual,
            "batch_size": batch_size,
        }
        if dtype == "int8":
            packed_w = (native.pack_int8_gated if gated else native.pack_int8)(w)
        else:
            packed_w = (native.pack_gated if gated else native.pack)(w)
        return native.product(x, packed_w, num_columns=num_columns, gated=gated, **options)
    if scale is not None:
        norm = RMSNorm(x.shape[1], EPS, scale.dtype)
        norm.scale = nnx.Param(scale)
        x = norm(x)
    y = matmul(x, w.reshape(x.shape[1], -1))
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    if gated:
        y = nnx.silu(y[:, :num_columns]) * y[:, num_columns:]
    return y if residual is None else residual + y


def run(case: Case, batch_size: int = NUM_ROWS, *, packed: bool = True) -> np.ndarray:
    arguments = [getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "dtype"]
    return np.asarray(_product(*arguments, np.int32(batch_size), dtype=case.dtype, packed=packed))[: max(batch_size, 0)]


def exactly(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """residual + act(norm(x) @ w + bias) in float64 of operands as the product takes them, and the error allowed, both [B, N].

    Rounding errors of float32 are taken as independent: n of size u add up to less than 4 sqrt(n) u (cases.py). A normalised
    x errs by 2 sqrt(K) + 8 units (test_rotary_write.py); rounded to bfloat16 it may be any number that a number within that
    error is rounded to. The sum of K products errs by 4 (sqrt(K) + 1) units of |x| . |w|. SiLU has slopes of at most 1.1, and
    errs by 16 units itself (exponential, division, product); bias and residual by 1 of their sum each. Numbers below the
    smallest normal one may count as zero, be they factors, products or sums. With int8 all this holds for the integers, and
    the scale errs by 1 unit more.
    """
    x, w = case.x.astype(np.float64), case.w.reshape(case.w.shape[0], -1)
    if case.dtype == "int8":
        w, scales = map(np.asarray, native.quantize(jnp.asarray(w)))
    w = w.astype(np.float64)
    k, error = x.shape[1], 0.0
    if case.scale is not None:
        x = x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + EPS) * case.scale.astype(np.float64)
        error = (2 * k**0.5 + 8) * _UNIT
    centre, low, high = (as_operand(x * factor, case.dtype) for factor in (1, 1 - error, 1 + error))
    error = np.maximum(np.abs(low - centre), np.abs(high - centre))
    size = np.abs(centre) @ np.abs(w)
    y, bound = centre @ w, error @ np.abs(w) + 4 * (k**0.5 + 1) * _UNIT * size
    bound = bound + _SMALLEST * (np.abs(w).sum(axis=0) + np.abs(centre).sum(axis=1, keepdims=True) + 2 * k)
    if case.dtype == "int8":
        y, bound = y * scales, (bound + _UNIT * np.abs(y)) * scales
    if case.bias is not None:
        y = y + case.bias.astype(np.float64).reshape(-1)
        bound = bound + _UNIT * np.abs(y)
    if case.w.ndim == 3:
        (gate, up), (gate_error, up_error) = (np.split(array, 2, axis=1) for array in (y, bound))
        silu = gate * scipy.special.expit(gate)
        y = silu * up
        bound = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu) * up_error + 16 * _UNIT * np.abs(y)
        bound = bound + 1e-35 * np.abs(up)  # exponentials below exp(-87)
    if case.residual is not None:
        y = y + case.residual.astype(np.float64)
        bound = bound + _UNIT * np.abs(y)
    return y, bound


def as_operand(x: np.ndarray, dtype: str) -> np.ndarray:
    """As the product takes it: rounded to bfloat16, or as it is."""
    return x if dtype == "float32" else x.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


def assert_close(actual: np.ndarray, case: Case) -> None:
    expected, bound = exactly(case)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    wrong = ~(np.abs(actual - expected) <= bound)  # NaN is wrong
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements beyond their bound; first {np.argwhere(wrong)[0]}, "
        f"{actual[wrong][0]} for {expected[wrong][0]} within {bound[wrong][0]:.2g}"
    )


@dtypes
@cases
def test_it_is_the_product_with_all_that_happens_around_it(k, n, options, dtype):
    case = make_case(k, n, options, dtype)
    assert_close(run(case), case)


@floats
@cases
def test_plain_jax_is_within_the_same_bounds(k, n, options, dtype):
    case = make_case(k, n, options, dtype)
    assert_close(run(case, packed=False), case)


@dtypes
def test_the_bound_tells_wrong_operands(dtype):
    case = make_case(64, 33, ALL | {"gated"}, dtype)
    out = run(case)
    for wrong in (
        {"x": np.where(np.arange(64) < 63, case.x, 0)},
        {"x": np.roll(case.x, 1, axis=1)},
        {"w": np.roll(case.w, 1, axis=2)},
        {"w": case.w[:, ::-1]},
        {"scale": None},
        {"bias": case.bias[::-1]},
        {"residual": None},
    ):
        with pytest.raises(AssertionError, match="beyond their bound"):
            assert_close(out, case.replace(**wrong))
    if dtype != "float32":
        with pytest.raises(AssertionError, match="beyond their bound"):  # x was rounded, or w
            assert_close(out, case.replace(dtype="float32"))


def test_rows_are_rounded_to_the_nearest_bfloat16_halves_to_even():
    numbers = np.arange(0x0080, 0x7F7F, 7, np.uint32)  # bits of normal ones
    halves = ((numbers << 16) + 0x8000).view(np.float32)
    x = np.concatenate([halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(np.inf)), -halves])
    x = np.resize(x, (-(-x.size // 64), 64))
    case = Case(x, np.eye(64, dtype=jnp.bfloat16), None, None, None, "bfloat16")
    np.testing.assert_array_equal(run(case, len(x)), x.astype(jnp.bfloat16).astype(np.float32))


@dtypes
def test_numbers_at_the_ends_of_the_range(dtype):
    case = make_case(31, 40, PLAIN, dtype)
    for factor in (2.0**-130, 2.0**-126, 2.0**-100, 2.0**100):
        small = case.replace(x=(case.x * np.float32(factor)).astype(np.float32))
        assert_close(run(small), small)
    end = 2e36 if dtype == "int8" else 3e38  # sums are of integers, up to 127 times as large
    gates = np.array([0, -0.0, 1e-38, -1e-38, 20, -20, 86, -86, 87, -87, 88, -88, 200, -200, end, -end], np.float32)
    gates = as_operand(gates, dtype).astype(np.float32)
    case = make_case(1, 15, frozenset(["gated"]), dtype)
    case = case.replace(x=np.resize(gates, (NUM_ROWS, 1)), w=np.ones_like(case.w))
    gate = case.x.astype(np.float64)
    expected = gate * scipy.special.expit(gate) * gate
    out = run(case)
    large = gate[:, 0] > 1e30  # its square is infinite
    assert np.isinf(out[large]).all()
    np.testing.assert_allclose(out[~large], np.tile(expected, 15)[~large], rtol=1e-6, atol=2e-34)


BITS = [(31, 40, ALL), (129, 1300, ALL), (64, 33, ALL | {"gated"}), (129, 1300, frozenset(["gated"]))]
BITS = pytest.mark.parametrize(("k", "n", "options"), BITS)


@dtypes
@BITS
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(k, n, options, dtype):
    case = make_case(k, n, options, dtype)
    expected = run(case)
    for batch_size in range(NUM_ROWS + 1):
        rest = np.arange(NUM_ROWS)[:, None] >= batch_size
        np.testing.assert_array_equal(
            run(case.replace(x=np.where(rest, np.nan, case.x)), batch_size), expected[:batch_size]
        )
    np.testing.assert_array_equal(run(case, -1), expected[:0])
    np.testing.assert_array_equal(run(case, NUM_ROWS + 5), expected)


@dtypes
@BITS
def test_a_rows_bits_do_not_depend_on_its_place_nor_on_its_neighbours(k, n, options, dtype):
    case = make_case(k, n, options, dtype)
    expected, rng = run(case), np.random.default_rng(0)
    for rows in (np.arange(NUM_ROWS)[::-1], *(rng.permutation(NUM_ROWS) for _ in range(3))):
        np.testing.assert_array_equal(run(case.take(rows)), expected[rows])
    for neighbour in (np.nan, np.inf, -np.inf, 0.0, 3e38):
        kept = rng.random((NUM_ROWS, 1)) < 0.5
        beside = run(case.replace(x=np.where(kept, case.x, np.float32(neighbour))))
        np.testing.assert_array_equal(beside[kept[:, 0]], expected[kept[:, 0]])
        if not np.isfinite(neighbour):
            assert not np.isfinite(beside[~kept[:, 0]]).any()


@dtypes
def test_rows_copied_all_over_give_the_same_bits_everywhere(dtype):
    case = make_case(129, 1300, ALL, dtype)
    same = run(case.take(np.full(NUM_ROWS, 7)))
    np.testing.assert_array_equal(same, np.broadcast_to(run(case)[7], same.shape))


def unpacked(packed: np.ndarray) -> np.ndarray:
    """[K, N] with the zeros that filled it up."""
    packed = np.swapaxes(packed, 2, 3) if packed.dtype == jnp.bfloat16 else packed  # [N/64, K/2, 2, 64]
    return packed.transpose(1, 2, 0, 3).reshape(packed.shape[1] * 2, -1)


@floats
@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 64), (8, 65)])
def test_packing_keeps_every_number_and_fills_up_with_zeros(k, n, dtype):
    w = make_case(k, n, PLAIN, dtype).w
    packed = np.asarray(native.pack(jnp.asarray(w)))
    last = (64, 2) if dtype == "bfloat16" else (2, 64)
    assert packed.shape == (-(-n // 64), -(-k // 2), *last) and packed.dtype == w.dtype
    whole = unpacked(packed).astype(np.float32)
    np.testing.assert_array_equal(whole[:k, :n], w.astype(np.float32))
    assert not whole[k:].any() and not whole[:, n:].any()
    w = make_case(k, n, frozenset(["gated"]), dtype).w
    whole = unpacked(np.asarray(native.pack_gated(jnp.asarray(w)))).astype(np.float32)
    blocks = whole.reshape(len(whole), -1, 2, 16)  # 16 columns of each in turns
    for half in range(2):
        part = blocks[:, :, half].reshape(len(whole), -1)
        np.testing.assert_array_equal(part[:k, :n], w[:, half].astype(np.float32))
        assert not part[k:].any() and not part[:, n:].any()


@floats
@pytest.mark.parametrize("size", [1, 31, 64])
def test_an_embedding_is_a_row_of_the_table_packed_or_not(size, dtype):
    table = make_case(37, size, PLAIN, dtype).w  # [V, K]
    ids = np.array([0, 36, 15, 16, 31, 32, 5, 5, -4], np.int32)
    embed = jax.jit(native.embed, static_argnums=2)
    for w in (jnp.asarray(table), native.pack(jnp.asarray(table).T)):
        out = np.asarray(embed(w, ids, size))
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, table[np.maximum(ids, 0)].astype(np.float32))
        np.testing.assert_array_equal(np.asarray(embed(w, ids, size, np.int32(3)))[:3], out[:3])
        embed(w, ids, size, np.int32(-1)), embed(w, ids, size, np.int32(99))
    np.testing.assert_array_equal(embed(jnp.asarray(table), np.int32([37, 1000]), size), np.tile(out[1], (2, 1)))


@pytest.mark.parametrize("pack", [native.pack, native.pack_int8])
def test_a_weight_that_is_not_packed_for_this_x_is_refused(pack):
    x, w = jnp.ones((2, 7)), pack(jnp.ones((9, 16)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="w is not packed for this x"):
        native.product(x, w, num_columns=16).block_until_ready()
