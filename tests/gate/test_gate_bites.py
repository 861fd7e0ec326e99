"""The compile gate finds seeded faults: spills, shared memory, copies, splits of a graph."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from gate.compiler import TARGETS, Program, compile_program, faults
from gate.programs import engine_program, kernel_program
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.shapes import SHAPES

pytestmark = pytest.mark.gate
H200 = TARGETS["h200"]
POOL = jax.ShapeDtypeStruct((4099, 8, 64, 128), jnp.bfloat16)


def found(program: Program, target: str = "h200") -> str:
    return "\n".join(faults(compile_program(program, TARGETS[target]), program, TARGETS[target]))


def product(size: int, num_warps: int, num_stages: int) -> Program:
    """A matrix product, one tile of `size` rows and columns per block."""

    def kernel(a, b, out):
        index, part = jnp.arange(size), jnp.arange(64)

        def add_part(step, total):
            x = plgpu.load(a.at[index[:, None], (step * 64 + part)[None, :]])
            y = plgpu.load(b.at[(step * 64 + part)[:, None], index[None, :]])
            return total + lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        total = lax.fori_loop(0, 16, add_part, jnp.zeros((size, size), jnp.float32))
        plgpu.store(out.at[index[:, None], index[None, :]], total)

    call = pl.pallas_call(
        kernel,
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name="product",
    )
    a, b = jax.ShapeDtypeStruct((size, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, size), jnp.bfloat16)
    return Program("product", jax.jit(call), (a, b))


def test_a_kernel_is_described_as_it_was_asked_for():
    (kernel,) = compile_program(product(64, 4, 3), H200).kernels
    assert (kernel.name, kernel.num_warps, kernel.num_stages, kernel.grid) == ("product", 4, 3, (1, 1, 1))
    assert kernel.shared_memory_bytes == 3 * 2 * 64 * 64 * 2  # stages of two operands
    assert 0 < kernel.registers < 255 and not kernel.spill_store_bytes


def test_spilled_registers_and_serialized_products_are_noticed():
    text = found(product(256, 8, 2))
    assert "product spills" in text
    assert "product: wgmma.mma_async instructions are serialized due to insufficient register resources" in text


def test_too_much_shared_memory_is_noticed():
    program = product(64, 4, 3)
    report = compile_program(program, H200)
    (kernel,) = report.kernels
    kernel = dataclasses.replace(kernel, shared_memory_bytes=H200.shared_memory_limit + 1)
    assert "product asks for 232449 bytes" in faults(dataclasses.replace(report, kernels=(kernel,)), program, H200)[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_program(product(64, 4, 16), H200)


def test_kernels_of_one_name_are_told_apart():
    first, second = product(64, 4, 3), product(64, 8, 2)
    both = jax.jit(lambda a, b: first.function(a, b) + second.function(a, b) * first.function(a, b).T)
    report = compile_program(dataclasses.replace(first, function=both), H200)
    assert {(kernel.num_warps, kernel.num_stages) for kernel in report.kernels} == {(4, 3), (8, 2)}


def write(pages, row):
    return lax.fori_loop(0, 5, lambda i, pages: pages.at[row + i, :, row % 64].set(1, mode="drop"), pages)


def pool_program(function, **options) -> Program:
    row = jax.ShapeDtypeStruct((4,), jnp.int32)
    return Program("write", jax.jit(function, **options), (POOL, row), pool=POOL, num_written=1)


def test_a_donated_write_is_in_place():
    assert not found(pool_program(write, donate_argnums=0))


@pytest.mark.parametrize("target", ["h200", "tpu_v5e"])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        pytest.param(write, {}, id="no donation"),
        pytest.param(lambda pages, row: jnp.where(row[0] > 2, write(pages, row), pages), None, id="select"),
        pytest.param(lambda pages, row: write(pages, row) * 2, None, id="arithmetic on all of it"),
        pytest.param(
            lambda pages, row: lax.cond(row[0] > 2, write, lambda pages, _: pages, pages, row), None, id="cond"
        ),
    ],
)
def test_a_copy_of_the_pool_is_noticed(function, options, target):
    options = {"donate_argnums": 0} if options is None else options
    assert "the pool is copied or worked on as a whole" in found(pool_program(function, **options), target)


def test_a_kernel_whose_pool_is_not_donated_is_noticed():
    program = kernel_program("rotary_write", SHAPES["llama3-8b"], "bfloat16", H200)
    kept = dataclasses.replace(program, function=jax.jit(program.function.__wrapped__))
    assert "the pool is copied or worked on as a whole: copy" in found(kept)


def test_a_program_of_the_engine_whose_state_is_not_donated_is_noticed():
    program = engine_program("update", H200, num_layers=1)
    kept = dataclasses.replace(program, function=jax.jit(program.function.__wrapped__))
    text = found(kept)
    assert "the pool is copied or worked on as a whole: copy" in text
    assert "only 0 bytes are written in place" in text


WHILE = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,WHILE", "xla_gpu_graph_min_graph_size": 1}


def graph_program(function, options) -> Program:
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    return Program("graph", jax.jit(function, compiler_options=options), (x,), one_command_buffer=True)


def until_small(x):
    return lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: jnp.sin(x @ (x.T @ x)), x)


def test_a_loop_that_the_host_drives_is_noticed():
    report = compile_program(graph_program(until_small, WHILE), H200)
    assert report.launches.one_command_buffer and report.launches.num_loops == 1
    assert "1 While" in found(graph_program(until_small, None))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: jnp.abs(jnp.fft.fft(x.T @ x)), "1 Fft", id="fft"),
        pytest.param(lambda x: jnp.sort(x, axis=-1), "the sort that yields", id="sort"),
        pytest.param(lambda x: lax.top_k(x.T @ x, 17)[0], "would be a call of CUB", id="top_k that sorts"),
    ],
)
def test_what_no_command_buffer_holds_is_noticed(function, message):
    assert message in found(graph_program(function, WHILE))


def test_a_small_top_k_is_no_sort():
    assert not compile_program(graph_program(functools.partial(lax.top_k, k=16), WHILE), H200).large_sorts
