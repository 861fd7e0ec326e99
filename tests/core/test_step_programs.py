"""The compiled programs of the step: the pool is written in place, and nothing leaves the device inside the loop."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxserve.core.scheduler import init_state
from jaxserve.core.step import run, run_steps, step
from pallas_kernels.native import library
from tests import workload
from tests.core.program_text import ALLOWED_CUSTOM_CALLS, assert_in_place, instructions
from tests.workload import CONFIG, MODEL

NUM_PAGES = 4099  # a prime: no other array has this length; and a pool that outweighs everything else
SHAPE = (NUM_PAGES, MODEL.num_kv_heads, CONFIG.page_size, MODEL.head_dim)
NATIVE = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=NATIVE)])


@functools.cache
def compiled(name: str, kv_dtype: str, backend: str) -> jax.stages.Compiled:
    config = dataclasses.replace(CONFIG, num_pages=NUM_PAGES, kv_dtype=kv_dtype, attention_backend=backend)
    functions = {
        "step": step,
        "run_steps": run_steps,
        "run": functools.partial(run, max_new_tokens=8, num_top_logprobs=3),
    }
    state = jax.eval_shape(lambda: init_state(MODEL, config))
    params = jax.eval_shape(lambda: workload.make_params(jnp.dtype(kv_dtype)))
    number = (jax.ShapeDtypeStruct((), jnp.int32),) if name == "run_steps" else ()
    program = functools.partial(functions[name], model=MODEL, config=config)
    return jax.jit(program, donate_argnums=1).lower(params, state, *number).compile()


@pytest.mark.slow
@backends
@pytest.mark.parametrize(
    ("name", "kv_dtype"), [("step", "bfloat16"), ("run_steps", "bfloat16"), ("run", "bfloat16"), ("run", "float32")]
)
def test_no_copy_of_a_pool_array_is_ever_made(name, kv_dtype, backend):
    size = NUM_PAGES * MODEL.num_kv_heads * CONFIG.page_size * MODEL.head_dim * jnp.dtype(kv_dtype).itemsize
    assert_in_place(compiled(name, kv_dtype, backend), SHAPE, size, 2 * MODEL.num_layers)


@pytest.mark.slow
@backends
@pytest.mark.parametrize("name", ["step", "run_steps", "run"])
def test_nothing_is_sent_to_the_host(name, backend):
    text = compiled(name, "bfloat16", backend).as_text()
    assert set(re.findall(r'custom_call_target="([^"]*)"', text)) <= ALLOWED_CUSTOM_CALLS
    opcodes = {opcode for _, opcode in instructions(text)}
    assert "while" in opcodes
    assert not opcodes & {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}


def test_a_callback_would_be_noticed():
    def program(x):
        return lax.fori_loop(0, 3, lambda _, x: jax.pure_callback(lambda x: x, x, x), x)

    text = jax.jit(program).lower(jnp.zeros(3)).compile().as_text()
    assert set(re.findall(r'custom_call_target="([^"]*)"', text)) - ALLOWED_CUSTOM_CALLS


def write(pages: jax.Array, row: jax.Array) -> jax.Array:
    return pages.at[row, :, row % CONFIG.page_size].set(1, mode="drop")


def loop(body):
    return lambda pages, rows: lax.fori_loop(0, 5, lambda i, pages: body(pages, rows + i), pages)


def assert_in_place_in_loop(body, dtype=jnp.float32, **options) -> None:
    pages, rows = jax.ShapeDtypeStruct(SHAPE, dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    program = jax.jit(loop(body), **options).lower(pages, rows).compile()
    assert_in_place(program, SHAPE, pages.size * pages.dtype.itemsize, 1)


def test_a_donated_write_in_a_loop_is_in_place():
    assert_in_place_in_loop(write, donate_argnums=0)
    assert_in_place_in_loop(write, jnp.uint16, donate_argnums=0)


@pytest.mark.parametrize(
    ("body", "dtype", "options"),
    [
        pytest.param(write, jnp.float32, {}, id="no donation"),
        pytest.param(
            lambda pages, rows: write(pages.astype(jnp.float32), rows).astype(jnp.bfloat16),
            jnp.bfloat16,
            {"donate_argnums": 0},
            id="conversion of all of it",  # what XLA:CPU makes of a bfloat16 scatter under JAX 0.10, not under 0.11
        ),
        pytest.param(
            lambda pages, rows: lax.cond(rows[0] > 2, write, lambda pages, _: pages, pages, rows),
            jnp.float32,
            {"donate_argnums": 0},
            id="cond that returns the pool",
        ),
        pytest.param(
            lambda pages, rows: jnp.where(rows[0] > 2, write(pages, rows), pages),
            jnp.float32,
            {"donate_argnums": 0},
            id="select",
        ),
        pytest.param(
            lambda pages, rows: (
                write(pages, pages[rows].sum(axis=(1, 2, 3)).astype(jnp.int32)) + pages[rows[0], 0, 0, 0]
            ),
            jnp.float32,
            {"donate_argnums": 0},
            id="arithmetic on all of it",
        ),
    ],
)
def test_copies_of_the_pool_are_noticed(body, dtype, options):
    with pytest.raises(AssertionError):
        assert_in_place_in_loop(body, dtype, **options)
