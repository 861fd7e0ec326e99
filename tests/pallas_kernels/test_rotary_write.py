"""The fused rotary embedding and paged write: reference and kernel against float64, what stays untouched, independence."""

import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.native import library
from pallas_kernels.paged_attention import PagedKV
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from pallas_kernels.rotary_write import rotary_write

_UNIT = 2.0**-24  # largest relative error of rounding to float32
_NUM_SLOTS, _PAGES_PER_SLOT, _EPS = 5, 3, 1e-6
PLAIN = ("float32", "bfloat16", "float16", "uint16")
SCALED = ("int8", "float8_e4m3fn", "float8_e5m2")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not library.available(), reason=str(library.why_not())))
BACKENDS = ("reference", "triton", NATIVE)  # Pallas' kernel in its interpreter


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows to rotate and write. Arrays are NumPy's."""

    qkv: np.ndarray  # [B, K, G+2, D]
    cos: np.ndarray  # [B, D/2]
    sin: np.ndarray
    k: np.ndarray  # [N, K, T, D], of random bits
    v: np.ndarray
    page_ids: np.ndarray
    slot: np.ndarray
    position: np.ndarray
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def take(self, rows: np.ndarray) -> "Case":
        return self.replace(**{name: getattr(self, name)[rows] for name in ("qkv", "cos", "sin", "slot", "position")})

    @property
    def written(self) -> list[tuple[int, int, int]]:
        """(row, page, offset) of the rows that write."""
        page_size = self.k.shape[2]
        places = []
        for row, (slot, position) in enumerate(zip(self.slot, self.position, strict=True)):
            if slot < _NUM_SLOTS and position < page_size * _PAGES_PER_SLOT:
                page = self.page_ids[slot, position // page_size]
                if page < len(self.k):
                    places.append((row, int(page), int(position % page_size)))
        return places

    def run(self, *program: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(np.asarray(x) for x in _jitted(*program)(*jax.tree.map(jnp.asarray, dataclasses.astuple(self))))


@functools.cache
def _jitted(backend: str, variant: str = ""):
    """`variant` makes another program of it."""

    def run(qkv, cos, sin, k, v, page_ids, slot, position, k_scale, v_scale, q_norm, k_norm):
        kv = PagedKV(k, v, page_ids, k_scale, v_scale)
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": _EPS}
        interpret = backend == "triton" and jax.default_backend() == "cpu"
        return rotary_write(qkv, cos, sin, kv, slot, position, **norms, backend=backend, interpret=interpret)

    return jax.jit(run)


def make_case(shape: AttentionShape, dtype: str, *, norms: bool = False, seed: int = 0) -> Case:
    """19 rows, shuffled: ends of pages, random positions, and seven that write nothing (no slot, no page, past the table)."""
    rng = np.random.default_rng(seed)
    page_size, head_dim, num_kv_heads = shape.page_size, shape.head_dim, shape.num_kv_heads
    num_pages, longest = _NUM_SLOTS * _PAGES_PER_SLOT + 2, page_size * _PAGES_PER_SLOT
    page_ids = rng.permutation(num_pages)[: _NUM_SLOTS * _PAGES_PER_SLOT].reshape(_NUM_SLOTS, _PAGES_PER_SLOT)
    page_ids[3, 1:] = num_pages
    rows = [
        (0, 0),
        (0, page_size - 1),
        (0, page_size),
        (0, longest - 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, page_size),
        (4, 3),
    ]
    rows += [(3, page_size), (3, longest - 1), (4, longest), *((_NUM_SLOTS, p) for p in (0, 1, 10**6, -7))]
    rows += [(4, int(p)) for p in rng.choice(np.arange(page_size, longest), 3, replace=False)]
    slot, position = np.array(rows, np.int32)[rng.permutation(len(rows))].T
    angle = rng.uniform(-np.pi, np.pi, (len(rows), head_dim // 2))
    pool = (num_pages, num_kv_heads, page_size, head_dim)
    scales = rng.uniform(0.01, 0.03, (2, num_kv_heads)).astype(np.float32) if dtype in SCALED else (None, None)
    weights = rng.uniform(0.5, 2, (2, head_dim)).astype(jnp.bfloat16) if norms else (None, None)
    return Case(
        qkv=rng.standard_normal((len(rows), num_kv_heads, shape.group_size + 2, head_dim)).astype(np.float32),
        cos=np.cos(angle).astype(np.float32),
        sin=np.sin(angle).astype(np.float32),
        k=_random_bits(rng, pool, dtype),
        v=_random_bits(rng, pool, dtype),
        page_ids=page_ids.astype(np.int32),
        slot=slot,
        position=position,
        k_scale=scales[0],
        v_scale=scales[1],
        q_norm=weights[0],
        k_norm=weights[1],
    )


def _random_bits(rng, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any number, infinities among them; NaN not, as XLA on CPU does not keep its bits where it copies bfloat16."""
    dtype = jnp.dtype(dtype)
    numbers = rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(as_numbers(numbers)), np.zeros((), dtype), numbers)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"uint{8 * array.dtype.itemsize}")


def rotated_exactly(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, norm: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Heads [B, K, heads, D] normalised and rotated in float64, and the error that float32 may make.

    In units of rounding: the sum of D squares, 1 each, errs by less than 4 sqrt(D) + 1 if errors are independent (cases.py);
    with the mean and eps, 2 more. The root halves that, and adds 4 of its own on a GPU; factor and weight add 2: below
    2 sqrt(D) + 8. A rotation's products and sum err by 2 of |x cos| + |y sin|, and the queries' scale by 2 more.
    """
    x, head_dim, units = x.astype(np.float64), x.shape[-1], 4.0
    if norm is not None:
        x = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + _EPS) * norm.astype(np.float64)
        units += 2 * head_dim**0.5 + 8
    first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
    cos, sin = (angle.astype(np.float64)[:, None, None, :] for angle in (cos, sin))
    out = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    size = np.concatenate([np.abs(first * cos) + np.abs(second * sin), np.abs(second * cos) + np.abs(first * sin)], -1)
    return out, units * _UNIT * size


def as_stored(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """[K, D] as pages of `dtype` hold it, each step rounded to nearest even; never falls where x rises."""
    x = x.astype(np.float32)
    x = x if scale is None else x / scale[:, None]
    if dtype == np.uint16:
        return x.astype(jnp.bfloat16).view(np.uint16)
    if dtype == np.int8:
        return np.clip(np.rint(x), -127, 127).astype(np.int8)
    largest = float(jnp.finfo(dtype).max) if dtype.itemsize == 1 else np.inf
    return np.clip(x, -largest, largest).astype(dtype)


def as_numbers(pages: np.ndarray) -> np.ndarray:
    return (pages.view(jnp.bfloat16) if pages.dtype == np.uint16 else pages).astype(np.float64)


_CASES = {
    "group of 7, page 16": (AttentionShape("", 14, 2, 64, page_size=16), "float16", False),
    "multi-head, head_dim 80": (AttentionShape("", 3, 3, 80), "uint16", False),
    "llama": (AttentionShape("", 8, 2, 128), "bfloat16", False),
    "qwen3": (AttentionShape("", 4, 2, 128, page_size=16), "float32", True),
    "qwen3, head_dim 20": (AttentionShape("", 7, 1, 20, page_size=8), "bfloat16", True),
    "head_dim 256": (AttentionShape("", 2, 1, 256), "float8_e4m3fn", True),
    "8-bit floats of the other kind": (AttentionShape("", 9, 3, 64), "float8_e5m2", False),
    "8-bit integers": (AttentionShape("", 4, 2, 80, page_size=16), "int8", True),
}


_NATIVE_DTYPES = ("float32", "bfloat16", "uint16")
backends_and_cases = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in _CASES for backend in ("reference", "triton")]
    + [
        pytest.param(name, *NATIVE.values, marks=NATIVE.marks)
        for name, (_, dtype, _) in _CASES.items()
        if dtype in _NATIVE_DTYPES
    ],
)


@functools.cache
def case_of(name: str) -> Case:
    shape, dtype, norms = _CASES[name]
    return make_case(shape, dtype, norms=norms, seed=len(name))


@functools.cache
def result_of(name: str, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return case_of(name).run(backend)


@backends_and_cases
def test_queries_are_those_of_float64_within_the_bound_of_float32(name, backend):
    case = case_of(name)
    expected, bound = rotated_exactly(case.qkv[:, :, :-2], case.cos, case.sin, case.q_norm)
    q = result_of(name, backend)[0]
    num_rows, _, _, head_dim = case.qkv.shape
    expected, bound = (x.reshape(num_rows, -1, head_dim) * head_dim**-0.5 for x in (expected, bound))
    assert q.dtype == np.float32 and q.shape == expected.shape
    assert (np.abs(q - expected) <= bound).all()  # of padding rows too: NaN would fail


@backends_and_cases
def test_values_and_keys_are_in_their_places_and_all_else_keeps_its_bits(name, backend):
    case = case_of(name)
    _, k, v = result_of(name, backend)
    expected_k, bound = rotated_exactly(case.qkv[:, :, -2:-1], case.cos, case.sin, case.k_norm)
    only_values = case.v.copy()
    only_keys = case.k.copy()
    assert len(case.written) == 12
    for row, page, offset in case.written:
        only_values[page, :, offset] = as_stored(case.qkv[row, :, -1], case.v_scale, case.v.dtype)
        lowest, highest = (
            as_numbers(as_stored(expected_k[row, :, 0] + sign * bound[row, :, 0], case.k_scale, case.k.dtype))
            for sign in (-1, 1)
        )
        stored = as_numbers(k[page, :, offset])
        assert ((lowest <= stored) & (stored <= highest)).all()
        only_keys[page, :, offset] = k[page, :, offset]
    np.testing.assert_array_equal(bits(v), bits(only_values))
    np.testing.assert_array_equal(bits(k), bits(only_keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_write_nothing(backend):
    case = case_of("qwen3")
    padding = case.replace(slot=np.full_like(case.slot, _NUM_SLOTS))
    q, k, v = padding.run(backend)
    np.testing.assert_array_equal(bits(k), bits(case.k))
    np.testing.assert_array_equal(bits(v), bits(case.v))
    np.testing.assert_array_equal(bits(q), bits(result_of("qwen3", backend)[0]))


@pytest.mark.parametrize("dtype", SCALED)
def test_kernel_rounds_halves_to_even_and_saturates(dtype):
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    halves = (numbers[1:] + numbers[:-1]) / 2
    values = np.concatenate([halves, np.nextafter(halves, -np.inf), np.nextafter(halves, np.inf), numbers * 2])
    shape = AttentionShape("", 1, 1, 64, page_size=16)
    case = make_case(shape, dtype)
    values = np.resize(values, (2, 19, 64)).astype(np.float32)  # what does not fit the first comes again in the second
    for part in values:
        qkv = case.qkv.copy()
        qkv[:, 0, 2] = part
        changed = case.replace(qkv=qkv, v_scale=np.full(1, 0.5, np.float32))
        _, _, v = changed.run("triton")
        for row, page, offset in changed.written:
            np.testing.assert_array_equal(bits(v[page, 0, offset]), bits(as_stored(part[row] * 2, None, v.dtype)))


@pytest.mark.parametrize("backend", ["triton", NATIVE])
@pytest.mark.parametrize("other_rows", ["NaN", "absent", "reversed"])
def test_bits_of_a_row_do_not_depend_on_other_rows(other_rows, backend):
    case = case_of("qwen3")
    q, k, v = result_of("qwen3", backend)
    row, page, offset = case.written[5]
    at = row
    if other_rows == "NaN":
        changed = case.replace(qkv=np.where((np.arange(19) == row)[:, None, None, None], case.qkv, np.float32(np.nan)))
    elif other_rows == "absent":
        changed, at = case.take(np.array([row])), 0
    else:
        changed, at = case.take(np.arange(19)[::-1]), 18 - row
    other_q, other_k, other_v = changed.run(backend)
    np.testing.assert_array_equal(bits(other_q[at]), bits(q[row]))
    np.testing.assert_array_equal(bits(other_k[page, :, offset]), bits(k[page, :, offset]))
    np.testing.assert_array_equal(bits(other_v[page, :, offset]), bits(v[page, :, offset]))


def test_programs_of_the_kernel_may_run_in_any_order(monkeypatch):
    name, program_id = "group of 7, page 16", pl.program_id
    forwards = result_of(name, "triton")
    monkeypatch.setattr(pl, "program_id", lambda axis: pl.num_programs(axis) - 1 - program_id(axis))
    for actual, expected in zip(case_of(name).run("triton", "backwards"), forwards, strict=True):
        np.testing.assert_array_equal(bits(actual), bits(expected))


def lowered_for_cuda(shape: AttentionShape, dtype: str, *, norms: bool) -> str:
    """StableHLO of a program that donates the pages, lowered for an NVIDIA GPU without one."""
    case = make_case(shape, dtype, norms=norms)
    arguments = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), getattr(case, field.name))
        for field in dataclasses.fields(case)
    ]

    def run(qkv, cos, sin, k, v, page_ids, slot, position, k_scale, v_scale, q_norm, k_norm):
        kv = PagedKV(k, v, page_ids, k_scale, v_scale)
        return rotary_write(qkv, cos, sin, kv, slot, position, q_norm=q_norm, k_norm=k_norm, backend="triton")

    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        traced = jax.jit(run, donate_argnums=(3, 4)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    list(zip(SHAPES, [*PLAIN, *SCALED] * 2, strict=False)),
)
def test_kernel_lowers_to_triton_with_both_page_arrays_in_place(shape, dtype):
    text = lowered_for_cuda(SHAPES[shape], dtype, norms=dtype == "bfloat16")
    (call,) = (line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line)
    aliases = call[call.index("output_operand_aliases") :]
    for operand in (0, 1):
        assert f"output_tuple_indices = [{operand}], operand_index = {operand}," in aliases
    assert ("div.rn.f32" in call) == (dtype in SCALED)


def test_a_head_dimension_that_cannot_be_split_or_held_is_refused():
    with pytest.raises(ValueError, match="head_dim is 65, but must be even and at most 256: use backend 'reference'"):
        make_case(AttentionShape("", 2, 2, 65), "float32").run("triton")
    with pytest.raises(ValueError, match="head_dim is 320"):
        make_case(AttentionShape("", 2, 2, 320), "float32").run("triton")


def test_8_bit_floats_that_a_gpu_cannot_convert_are_refused(monkeypatch):
    case = make_case(AttentionShape("", 2, 2, 64), "float8_e4m3fn")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0")])
    with pytest.raises(ValueError, match="compute capability 8.9 or more, this one has 8.0"):
        case.run("triton")


def test_pages_of_another_dtype_and_pools_that_int32_cannot_count_are_refused():
    case = make_case(AttentionShape("", 2, 2, 64), "float32")
    with pytest.raises(ValueError, match="pages are int32, but must be one of float32, .*, uint16"):
        case.replace(k=case.k.view(np.int32)).run("triton")
    arguments = [jax.tree.map(jnp.asarray, getattr(case, field.name)) for field in dataclasses.fields(case)]
    arguments[3] = jax.ShapeDtypeStruct((2**18 + 1, 2, 64, 64), jnp.float32)
    with pytest.raises(ValueError, match="has 2147491840 elements, more than 2147483648: use fewer pages"):
        jax.eval_shape(_jitted("triton"), *arguments)
