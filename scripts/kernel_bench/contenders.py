"""The contenders that the benchmark times on one case: the backends of the public functions, and baselines on the same data.

Each contender goes from pool to pool, so that no cache holds what it reads. Each call takes the result of the call before, so
that the compiler can neither leave a call out nor move it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped
from kernel_bench.cases import Case, Data

from pallas_kernels.paged_attention import chunk_attention, chunk_blocks, decode_attention
from pallas_kernels.pages import PagedKV
from pallas_kernels.rotary_write import rotary_write

BASELINES = ("reference", "cudnn", "torch")
SPLITTING = ("triton", "jax_triton")  # backends that take num_splits
_UNROLLED = 4  # calls per iteration of a loop on accelerators, which hides the cost of an iteration
_OWN_KERNELS = {"chunk": ("triton", "tpu", "reference"), "rotary_write": ("triton", "reference")}
_CUDNN_DTYPES = ("bfloat16", "float16")
_TORCH_DTYPES = ("float32", "bfloat16", "float16")


class Unavailable(Exception):
    """Raised if a contender cannot run on a case; the message says why."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A function to time on one case.

    Attributes:
      result: computes the case on the last pool, for comparison.
      loop: takes a number of iterations and returns a function that runs them, from a given pool on, and waits.
      calls_per_iteration: calls that an iteration makes.
    """

    result: Callable[[], Any]
    loop: Callable[[int], Callable[[int], Any]]
    calls_per_iteration: int = 1


def make_contender(name: str, case: Case, data: Data) -> Contender:
    """Returns the contender by this name: a backend, "cudnn" or "torch".

    Raises:
      Unavailable: if it cannot run the case here.
      ValueError: if a backend refuses the case; some do so only when their result is computed.
    """
    if name == "cudnn":
        return _cudnn(case, data)
    if name == "torch":
        return _torch(case, data)
    if name not in _OWN_KERNELS.get(case.op, (name,)):
        raise Unavailable(f"{name} has no {case.op} kernel of its own")
    if name == "jax_triton" and importlib.util.find_spec("jax_triton") is None:
        raise Unavailable("jax-triton is not installed")
    return _rotary_write(case, data, name) if case.op == "rotary_write" else _attention(case, data, name)


def _attention(case: Case, data: Data, backend: str) -> Contender:
    shape = case.shape
    options: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap, "backend": backend}
    if case.op == "decode":
        attention, blocks = decode_attention, None
        if backend in SPLITTING:
            options["num_splits"] = case.num_splits
    else:
        attention = chunk_attention
        sizes = {"num_slots": case.num_slots, "group_size": shape.group_size, "backend": backend}
        blocks = jax.jit(functools.partial(chunk_blocks, **sizes))(data.slot, data.position)

    @functools.partial(jax.jit, static_argnames="num_iterations")
    def run(start: Int32[Array, ""], data: Data, blocks: Any, *, num_iterations: int) -> Float32[Array, "B H D"]:
        extra = {} if case.op == "decode" else {"blocks": blocks}

        def call(index: Int32[Array, ""], q: Float32[Array, "B H D"]) -> Float32[Array, "B H D"]:
            now, q = lax.optimization_barrier((data, q))  # otherwise XLA widens the whole pool once, before the loop
            kv = now.kv(_table(now, start + index))
            return attention(q, kv, now.slot, now.position, sinks=now.sinks, **options, **extra)

        return lax.fori_loop(0, num_iterations, call, data.q, unroll=min(num_iterations, _unrolled()))

    def loop(num_iterations: int) -> Callable[[int], Any]:
        return lambda start: jax.block_until_ready(run(jnp.int32(start), data, blocks, num_iterations=num_iterations))

    return Contender(result=lambda: loop(1)(data.num_pools - 1), loop=loop)


def _table(data: Data, index: Int32[Array, ""]) -> Int32[Array, "S P"]:
    return lax.dynamic_index_in_dim(data.tables, lax.rem(index, jnp.int32(data.num_pools)), keepdims=False)


def _unrolled() -> int:
    return 1 if jax.default_backend() == "cpu" else _UNROLLED


def _rotary_write(case: Case, data: Data, backend: str) -> Contender:
    """Makes the contender of rotary_write. It writes its own pages in place; the projection stays in the cache."""
    pages = [jnp.copy(data.k), jnp.copy(data.v)]
    data = data._replace(k=None, v=None)

    @functools.partial(jax.jit, static_argnames="num_iterations", donate_argnums=(1, 2))
    def run(start: Int32[Array, ""], k: Any, v: Any, data: Data, *, num_iterations: int) -> tuple[Any, Any, Any]:
        def call(index: Int32[Array, ""], carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            _, k, v = carry
            qkv, k = lax.optimization_barrier((data.qkv, k))  # otherwise XLA computes the queries once, before the loop
            kv = PagedKV(k, v, _table(data, start + index), data.k_scale, data.v_scale)
            return rotary_write(qkv, data.cos, data.sin, kv, data.slot, data.position, backend=backend)

        return lax.fori_loop(0, num_iterations, call, (data.q, k, v))

    def loop(num_iterations: int) -> Callable[[int], Any]:
        def timed(start: int) -> Any:
            q, *pages[:] = jax.block_until_ready(run(jnp.int32(start), *pages, data, num_iterations=num_iterations))
            return q, *pages

        return timed

    return Contender(result=lambda: loop(1)(data.num_pools - 1), loop=loop)


def _cudnn(case: Case, data: Data) -> Contender:
    shape = case.shape
    if jax.default_backend() not in ("gpu", "cuda"):
        raise Unavailable(f"cuDNN needs an NVIDIA GPU, but the default device is a {jax.default_backend()}")
    if case.op == "rotary_write":
        raise Unavailable("cuDNN's attention writes no pages")
    if case.dtype not in _CUDNN_DTYPES:
        raise Unavailable(f"cuDNN's paged attention takes no {case.dtype}")
    if shape.window is not None or shape.softcap is not None or shape.sinks:
        raise Unavailable(
            "cuDNN's paged attention has no soft cap and no sinks, and a window only from the first row on"
        )
    if case.op == "chunk" and case.batch != case.context:
        raise Unavailable(
            "cuDNN counts the causal mask from the first position: only whole prompts, --batch = --context"
        )
    # Its pool must have exactly the pages that the table names, so each pool is an array of its own.
    num_pages = case.num_pages
    pools = [
        tuple(pages[index * num_pages : (index + 1) * num_pages] for pages in (data.k, data.v))
        for index in range(data.num_pools)
    ]
    tables = [data.tables[index] - index * num_pages for index in range(data.num_pools)]
    queries = data.q[:, :, None, :] if case.op == "decode" else data.q.swapaxes(0, 1)[None]
    queries = queries.astype(case.dtype)
    lengths = jnp.full((case.num_slots,), case.context, jnp.int32)
    attend = functools.partial(_cudnn_attention, causal=case.op == "chunk")

    @functools.partial(jax.jit, static_argnames="num_iterations")
    def run(queries: Any, pools: Any, tables: Any, lengths: Any, *, num_iterations: int) -> Any:
        def call(_: Any, queries: Any) -> Any:
            for (k, v), page_ids in zip(pools, tables, strict=True):
                queries = attend(queries, k, v, page_ids, lengths)
            return queries

        return lax.fori_loop(0, num_iterations, call, queries)

    def loop(num_iterations: int) -> Callable[[int], Any]:
        return lambda _: jax.block_until_ready(run(queries, pools, tables, lengths, num_iterations=num_iterations))

    def result() -> Float32[Array, "B H D"]:
        out = run(queries, pools[-1:], tables[-1:], lengths, num_iterations=1).astype(jnp.float32)
        return out[:, :, 0] if case.op == "decode" else out[0].swapaxes(0, 1)

    return Contender(result, loop, calls_per_iteration=len(pools))


def _cudnn_attention(
    queries: Shaped[Array, "S H X D"],
    k: Shaped[Array, "N K T D"],
    v: Shaped[Array, "N K T D"],
    page_ids: Int32[Array, "S P"],
    lengths: Int32[Array, " S"],
    *,
    causal: bool,
) -> Shaped[Array, "S H X D"]:
    """Makes cuDNN's paged attention, from a private module of JAX: `jax.nn.dot_product_attention` takes no page table."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    table = page_ids[:, None, :, None]
    return cudnn.paged_attention(
        queries,
        k,
        v,
        jnp.full(lengths.shape, queries.shape[2], jnp.int32),
        lengths,
        table,
        table,
        mask_type=cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING,
        qkv_layout="BNTH",
    )


def _torch(case: Case, data: Data) -> Contender:
    """Makes PyTorch's attention over contiguous keys and values, which are gathered from the pages before it is timed."""
    shape, platform = case.shape, jax.default_backend()
    try:
        import torch
        from torch.nn.attention import bias
    except ImportError:
        raise Unavailable("PyTorch is not installed") from None
    if platform not in ("cpu", "gpu", "cuda"):
        raise Unavailable(f"PyTorch does not run on a {platform} here")
    on_gpu = platform != "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unavailable("this PyTorch has no CUDA")
    if case.op == "rotary_write":
        raise Unavailable("PyTorch's attention writes no pages")
    if case.dtype not in _TORCH_DTYPES:
        raise Unavailable(f"PyTorch's attention takes no {case.dtype}")
    if shape.softcap is not None or shape.sinks:
        raise Unavailable("PyTorch's attention has no soft cap and no sinks")
    if shape.window is not None and case.op == "chunk":
        raise Unavailable("PyTorch's attention has no window")
    gather = jax.jit(functools.partial(_contiguous, first=case.context - case.num_keys, last=case.context))
    keys, values = (
        [torch.from_dlpack(jax.block_until_ready(gather(pages, table))) for table in data.tables]
        for pages in (data.k, data.v)
    )
    queries = data.q[:, :, None, :] if case.op == "decode" else data.q.swapaxes(0, 1)[None]
    queries = torch.from_dlpack(jax.block_until_ready(queries.astype(case.dtype)))
    options: dict[str, Any] = {"scale": 1.0, "enable_gqa": shape.group_size > 1}
    if case.op == "chunk":
        options["attn_mask"] = bias.causal_lower_right(case.batch, case.context)

    def calls(start: int, num_iterations: int) -> Any:
        for index in range(start, start + num_iterations):
            pool = index % data.num_pools
            out = torch.nn.functional.scaled_dot_product_attention(queries, keys[pool], values[pool], **options)
        return out

    def loop(num_iterations: int) -> Callable[[int], Any]:
        if not on_gpu:
            return lambda start: calls(start, num_iterations)
        calls(0, data.num_pools)  # chooses kernels, which must not happen while a graph is recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls(0, num_iterations)
        return lambda _: (graph.replay(), torch.cuda.synchronize())

    def result() -> Float32[Array, "B H D"]:
        out = calls(data.num_pools - 1, 1).float().cpu().numpy()
        return jnp.asarray(np.ascontiguousarray(out[:, :, 0] if case.op == "decode" else out[0].swapaxes(0, 1)))

    return Contender(result, loop)


def _contiguous(
    pages: Shaped[Array, "N K T D"], page_ids: Int32[Array, "S P"], *, first: int, last: int
) -> Shaped[Array, "S K n D"]:
    """Returns the numbers at positions first to last - 1 of every sequence, gathered from their pages."""
    slots, (_, heads, _, head_dim) = page_ids.shape[0], pages.shape
    gathered = pages.at[page_ids].get(mode="clip").swapaxes(1, 2)
    if gathered.dtype == jnp.uint16:
        gathered = lax.bitcast_convert_type(gathered, jnp.bfloat16)
    return gathered.reshape(slots, heads, -1, head_dim)[:, :, first:last]
