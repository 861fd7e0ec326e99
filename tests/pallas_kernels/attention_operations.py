"""The operations of attention over pages as tests call them: shapes, backends, compiled programs, lowering without a GPU."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.paged_attention import PagedKV, chunk_attention, decode_attention
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.pallas_kernels.cases import Case, make_case

NATIVE = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")
BACKENDS = ["reference", "triton", "tpu", "native"]
COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "uint16": "bfloat16"}  # else float16


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One of the two operations.

    Attributes:
      name: "decode" or "chunk".
      function: the operation.
      shapes: by name.
      few_shapes: for backends that are tested with some shapes only, the names of these.
      case_options: of `make_case`.
      options: of the operation, in every call.
    """

    name: str
    function: Callable
    shapes: dict[str, AttentionShape]
    few_shapes: dict[str, Sequence[str]]
    case_options: dict
    options: dict

    def case(self, name: str, dtype: str, **options) -> Case:
        return _case(self.shapes[name], dtype, tuple({**self.case_options, **options}.items()))

    def run(self, backend: str, case: Case, **options) -> np.ndarray:
        options = tuple({**self.options, **options}.items())
        program = _compiled(self.function, backend, case.shape.window, case.shape.softcap, options)
        return np.asarray(program(*case.rows, sinks=case.options["sinks"]))

    def has(self, backend: str, name: str, *dtype: str) -> bool:
        """Returns whether a backend is tested with a shape and a dtype."""
        if name not in self.few_shapes.get(backend, self.shapes):
            return False
        if backend == "native":
            return name != "many heads" and not set(dtype) - {"float32", "bfloat16", "uint16"}
        return backend != "tpu" or "float16" not in dtype

    def with_backends(self, *cases: tuple) -> list:
        """Test parameters: the operation, a backend and a case, for every backend that has the case."""
        return [
            pytest.param(
                self, backend, *case, marks=NATIVE if backend == "native" else (), id=_id(self, backend, *case)
            )
            for case in cases
            for backend in BACKENDS
            if self.has(backend, *case)
        ]


def _id(operation: Operation, *values: object) -> str:
    return "-".join([operation.name, *map(str, values)])


@functools.lru_cache(maxsize=16)
def _case(shape: AttentionShape, dtype: str, options: tuple) -> Case:
    return make_case(shape, dtype, **dict(options))


@functools.cache
def _compiled(function: Callable, backend: str, window: int | None, softcap: float | None, options: tuple):
    limits = {"window": window, "softcap": softcap, "backend": backend, "interpret": backend in ("triton", "tpu")}
    return jax.jit(functools.partial(function, **limits, **dict(options)))


_SMALL = AttentionShape("small", 6, 2, 8, page_size=8, window=1, softcap=5.0, sinks=True)

# Beside the heads of real models: the smallest page, head and window; more query heads than a program or block has; padding.
DECODE = Operation(
    "decode",
    decode_attention,
    shapes={
        **SHAPES,
        "small": _SMALL,
        "many heads": AttentionShape("many heads", 45, 1, 16, page_size=16, sinks=True),
        "wide heads": AttentionShape("wide heads", 3, 3, 144, page_size=32, window=40),
    },
    few_shapes={"tpu": ["gemma2-2b", "gpt-oss-20b", "llama-135m", "small"]},  # its interpreter is slow
    case_options={"pages_per_slot": 3},
    options={"num_splits": 2},
)
# And tiles that every batch row sees as a whole, between two edges of a window.
CHUNK = Operation(
    "chunk",
    chunk_attention,
    shapes={
        **SHAPES,
        "small": _SMALL,
        "many heads": AttentionShape("many heads", 140, 1, 16, page_size=16, sinks=True),
        "wide heads": AttentionShape("wide heads", 3, 1, 144, page_size=32, window=40),
        "long window": AttentionShape("long window", 8, 1, 32, page_size=128, window=250, softcap=20.0, sinks=True),
    },
    few_shapes={
        "tpu": ["llama-135m", "small", "wide heads"],
        # The reference is the same function for both operations; the tests of decoding run it with every shape.
        "reference": ["llama-135m", "gpt-oss-20b", "small", "wide heads", "long window"],
    },
    case_options={"chunks": True, "pages_per_slot": 3, "max_rows_per_slot": 45},
    options={},
)
OPERATIONS = (DECODE, CHUNK)


def compute_of(backend: str, dtype: str) -> str:
    """Returns the dtype that the backend rounds operands of products to."""
    if backend in ("reference", "native") or dtype == "float32":
        return "float32"
    return "bfloat16" if backend == "tpu" else COMPUTE.get(dtype, "float16")


def arguments_of(
    shape: AttentionShape, dtype: str = "bfloat16", num_rows: int = 4, num_pages: int = 9, pages_per_slot: int = 2
) -> tuple:
    """Returns the shapes of positional arguments, without arrays."""
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = jax.ShapeDtypeStruct((num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype)
    q = jax.ShapeDtypeStruct((num_rows, shape.num_heads, shape.head_dim), jnp.float32)
    return q, PagedKV(pages, pages, int32((2, pages_per_slot))), int32((num_rows,)), int32((num_rows,))


def lowered_for_cuda(operation: Operation, case: Case, **options) -> str:
    """StableHLO for an NVIDIA GPU, made without one."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    options = {**case.options, **options, "backend": "triton"}
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.rows, options.pop("sinks")))

    def attention(rows, sinks):
        return operation.function(*rows, sinks=sinks, **options)

    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        traced = jax.jit(attention).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
