"""The programs that the compile gate compiles: every kernel at the named shapes, and the engine's step."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from gate.compiler import Program, Target

from jaxserve import EngineConfig, ModelConfig, SamplingParams, init_state, make_submission
from jaxserve.core.programs import Changes, programs
from jaxserve.models.families.hugging_face import read_model_config
from jaxserve.models.params import abstract_params
from pallas_kernels.paged_attention import PagedKV, chunk_attention, decode_attention, jax_triton_decode
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from pallas_kernels.rotary_write import rotary_write

OPS = ("decode", "chunk", "rotary_write")
GPU_OPS = (*OPS, "jax_triton_decode")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16")
ENGINE_PROGRAMS = ("step", "run_steps", "update")
_BACKENDS = {"cuda": "triton", "tpu": "tpu"}
_NUM_PAGES = (
    4099  # a prime, so that no other array has the pool's shape; large, so that the pool is larger than everything else
)
_PAGES_PER_SLOT = 128
_ROWS = {"decode": 32, "jax_triton_decode": 32, "chunk": 512, "rotary_write": 32}
_MODELS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "models"


def kernel_program(op: str, shape: AttentionShape, dtype: str, target: Target, **options: Any) -> Program:
    """Returns a program that is one call of an operation.

    Args:
      op: one of `OPS`, or for GPUs of `GPU_OPS`.
      shape: heads, page size and options.
      dtype: dtype of the pages; pages of 8 bits have scales.
      target: the device, which decides the backend.
      **options: options of the operation, in addition to those of the shape.
    """
    rows, scales = _ROWS[op], None
    pool = _array(dtype, _NUM_PAGES, shape.num_kv_heads, shape.page_size, shape.head_dim)
    if pool.dtype.itemsize == 1:
        scales = _array("float32", shape.num_kv_heads)
    kv = PagedKV(pool, pool, _array("int32", rows, _PAGES_PER_SLOT), scales, scales)
    slot = _array("int32", rows)
    options = {"backend": _BACKENDS[target.platform], **options}
    name = "/".join([op, shape.name, dtype, *(f"{key}={value}" for key, value in options.items() if key != "backend")])
    if op == "rotary_write":
        return _write_program(name, shape, kv, options)
    attend = {"decode": decode_attention, "chunk": chunk_attention}.get(op)
    if attend is None:
        attend = functools.partial(jax_triton_decode.decode_attention, compute_capability=target.compute_capability)
        del options["backend"]
    sinks = _array("float32", shape.num_heads) if shape.sinks else None

    def function(q: jax.Array, kv: PagedKV, slot: jax.Array, position: jax.Array, sinks: jax.Array | None) -> jax.Array:
        limits = {"window": shape.window, "softcap": shape.softcap, "sinks": sinks}
        return attend(q, kv, slot, position, **limits, **options)

    q = _array("float32", rows, shape.num_heads, shape.head_dim)
    return Program(name, jax.jit(function), (q, kv, slot, slot, sinks), pool=pool)


def _write_program(name: str, shape: AttentionShape, kv: PagedKV, options: dict[str, Any]) -> Program:
    rows = kv.num_slots
    qkv = _array("float32", rows, shape.num_kv_heads, shape.group_size + 2, shape.head_dim)
    half = _array("float32", rows, shape.head_dim // 2)
    norm = _array("float32", shape.head_dim)

    @functools.partial(jax.jit, donate_argnums=0)
    def function(pages: tuple[jax.Array, jax.Array], rest: tuple, norms: tuple) -> tuple[jax.Array, ...]:
        qkv, cos, sin, kv, slot, position = rest
        kv = kv._replace(k=pages[0], v=pages[1])
        return rotary_write(qkv, cos, sin, kv, slot, position, q_norm=norms[0], k_norm=norms[1], **options)

    slot = _array("int32", rows)
    rest = (qkv, half, half, kv._replace(k=None, v=None), slot, slot)
    return Program(name, function, ((kv.k, kv.v), rest, (norm, norm)), pool=kv.k, num_written=2)


def engine_program(name: str, target: Target, *, num_layers: int = 4, **fields: Any) -> Program:
    """Returns a program of an engine for the shape of Llama 3 8B, with few layers and a smaller vocabulary.

    Args:
      name: one of `ENGINE_PROGRAMS`.
      target: the device, which decides the backend.
      num_layers: L.
      **fields: fields of EngineConfig, in place of the ones here.
    """
    model = read_model_config(_MODELS / "llama3-8b.json")
    model = dataclasses.replace(model, num_layers=num_layers, windows=(None,) * num_layers, vocab_size=8192)
    capacities = {"max_slots": 64, "num_pages": _NUM_PAGES, "page_size": 64, "max_model_len": 4096, "chunk_size": 256}
    fields = {"kv_dtype": "bfloat16", "attention_backend": _BACKENDS[target.platform], **capacities, **fields}
    config = EngineConfig(**fields)
    params = abstract_params(model, jnp.bfloat16)
    state = jax.eval_shape(lambda: init_state(model, config))
    args = {
        "step": (params, state),
        "run_steps": (params, state, _array("int32")),
        "update": (state, _changes(model, config)),
    }
    return Program(
        name=f"{name}/{config.backend}",
        function=programs(model, config)[name],
        args=args[name],
        pool=_array("bfloat16", _NUM_PAGES, model.num_kv_heads, config.page_size, model.head_dim),
        num_written=2 * num_layers,
        one_command_buffer=True,
    )


def _changes(model: ModelConfig, config: EngineConfig) -> Changes:
    rows = make_submission([[1]], SamplingParams(), model=model, config=config, num_rows=config.max_slots)
    of_rows, generation = _array("bool", config.queue_size), _array("int32", config.queue_size)
    shapes = jax.tree.map(lambda leaf: _array(leaf.dtype, *leaf.shape), rows)
    return Changes(submission=shapes, collected=of_rows, aborted=of_rows, generation=generation)


def _dtypes(target: Target) -> tuple[str, ...]:
    """Returns the dtypes to compile for. Below compute capability 8.9, float8_e4m3fn makes Triton end the process."""
    has_e4m3 = target.platform == "tpu" or target.compute_capability >= 89
    return tuple(dtype for dtype in DTYPES if has_e4m3 or dtype != "float8_e4m3fn")


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def named_programs(target: Target) -> dict[str, Callable[[], Program]]:
    """Returns functions that make the programs for a target, by name."""
    makers: dict[str, Callable[[], Program]] = {}
    for op in GPU_OPS if target.platform == "cuda" else OPS:
        for shape in SHAPES.values():
            for dtype in _dtypes(target):
                makers[f"{op}/{shape.name}/{dtype}"] = functools.partial(kernel_program, op, shape, dtype, target)
    for name in ENGINE_PROGRAMS:
        makers[name] = functools.partial(engine_program, name, target)
    return makers
