"""Every kernel compiles for real GPUs without spilling registers, and for real TPUs; none makes XLA copy the pool."""

import pytest
from gate.compiler import TARGETS, Report, compile_program, faults
from gate.programs import GPU_OPS, kernel_program

from pallas_kernels.paged_attention.shapes import SHAPES

pytestmark = pytest.mark.gate
KERNELS = {
    "decode": {"paged_decode", "paged_decode_combine"},
    "jax_triton_decode": {"decode_whole", "decode_split", "combine"},
    "chunk": {"paged_chunk"},
    "rotary_write": {"rotary_write"},
}
MOST_SPILLED_ON_AMPERE = 16  # bytes per thread, of kernels whose sizes are chosen for Hopper
# XLA:TPU gives arrays whose last axis does not fill 128 lanes a layout of its own, which is not the one of the kernels.
NARROW = tuple(name for name, shape in SHAPES.items() if shape.head_dim % 128)


def assert_compiles(op: str, shape: str, dtype: str, target: str, **options) -> Report:
    program = kernel_program(op, SHAPES[shape], dtype, TARGETS[target], **options)
    report = compile_program(program, TARGETS[target])
    assert not faults(report, program, TARGETS[target])
    return report


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", GPU_OPS)
def test_a_kernel_compiles_for_hopper_at_every_shape(op, shape):
    names = {kernel.name for kernel in assert_compiles(op, shape, "bfloat16", "h200").kernels}
    assert names and names <= KERNELS[op]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("llama3-8b", "float32"),
        ("llama3-8b", "float16"),
        ("llama3-8b", "float8_e4m3fn"),
        ("llama3-8b", "int8"),
        ("gemma2-2b", "float32"),
        ("gemma2-2b", "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("op", GPU_OPS)
def test_a_kernel_compiles_for_hopper_in_every_dtype(op, shape, dtype):
    assert assert_compiles(op, shape, dtype, "h200").kernels


@pytest.mark.parametrize("num_splits", [1, 2, 128])
def test_decode_compiles_for_hopper_with_any_number_of_splits(num_splits):
    report = assert_compiles("decode", "llama3-8b", "bfloat16", "h200", num_splits=num_splits)
    assert len(report.kernels) == (1 if num_splits == 1 else 2)


@pytest.mark.parametrize("shape", ["llama3-8b", "gpt-oss-20b"])
@pytest.mark.parametrize("op", GPU_OPS)
def test_a_kernel_compiles_for_ampere(op, shape):
    program = kernel_program(op, SHAPES[shape], "bfloat16", TARGETS["a100"])
    report = compile_program(program, TARGETS["a100"])
    assert report.kernels and max(kernel.spill_store_bytes for kernel in report.kernels) <= MOST_SPILLED_ON_AMPERE
    assert all("spills" in fault for fault in faults(report, program, TARGETS["a100"]))


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        *(("decode", name) for name in SHAPES if name not in NARROW),
        *(("chunk", name) for name in ("llama3-8b", "llama3-8b-page16", "gemma2-2b")),
        ("rotary_write", "llama3-8b"),
    ],
)
def test_a_kernel_compiles_for_tpu_v5e(op, shape):
    assert_compiles(op, shape, "bfloat16", "tpu_v5e")


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "int8"])
def test_a_kernel_compiles_for_tpu_v5e_in_every_dtype(dtype):
    assert_compiles("decode", "llama3-8b", dtype, "tpu_v5e")


@pytest.mark.parametrize("op", ["decode", "chunk"])
def test_a_kernel_compiles_for_tpu_v6e(op):
    assert_compiles(op, "llama3-8b", "bfloat16", "tpu_v6e")


@pytest.mark.parametrize("shape", NARROW)
def test_a_kernel_of_narrow_heads_compiles_for_tpu_v5e_but_has_the_pool_copied(shape):
    program = kernel_program("decode", SHAPES[shape], "bfloat16", TARGETS["tpu_v5e"])
    found = faults(compile_program(program, TARGETS["tpu_v5e"]), program, TARGETS["tpu_v5e"])
    assert found and all("the pool is copied" in fault for fault in found)
