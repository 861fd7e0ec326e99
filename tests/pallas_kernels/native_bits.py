"""One digest of what all native kernels compute, for processes that must agree on every bit.

As a program it prints the digest and the number of XLA's threads.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.paged_attention import PagedKV
from tests.pallas_kernels import block_cases

NUM_ROWS = 37


def digest() -> str:
    """Returns a digest of products (also of subnormal numbers), attention over pages, blocks, and sampling."""
    rng = np.random.default_rng(0)
    bits = hashlib.sha256()

    def add(function: Callable[..., Any], *arguments: Any) -> None:
        for leaf in jax.tree.leaves(jax.jit(function)(*arguments)):
            bits.update(np.asarray(leaf).tobytes())

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def product(x, w, scale, residual):
        plain = native.product(x, native.pack(w), num_columns=w.shape[1], residual=residual)
        gates = w.reshape(w.shape[0], 2, -1)
        gated = native.product(x, native.pack_gated(gates), num_columns=gates.shape[2], scale=scale, gated=True)
        return plain, gated, native.embed(native.pack(w), jnp.arange(9, dtype=jnp.int32), w.shape[0])

    sizes = np.float32(2.0) ** rng.integers(-140, 10, (NUM_ROWS, 1)).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        add(
            product, random(NUM_ROWS, 129) * sizes, random(129, 1300).astype(dtype), random(129), random(NUM_ROWS, 1300)
        )

    def attend(qkv, cos, sin, k, v, page_ids, slot, position):
        kv = PagedKV(k, v, page_ids)
        q, k, v = native.rotary_write(qkv, cos, sin, kv, slot, position)
        return native.paged_attention(q, kv._replace(k=k, v=v), slot, position, window=50, softcap=9.0), k, v

    slot = np.sort(rng.integers(0, 6, NUM_ROWS)).astype(np.int32)  # 5: none
    position = (np.arange(NUM_ROWS) + 30).astype(np.int32)
    k, v = (random(30, 3, 16, 40).astype(jnp.bfloat16).view(np.uint16) for _ in range(2))
    page_ids = rng.permutation(30).reshape(5, 6).astype(np.int32)
    add(attend, random(NUM_ROWS, 3, 5, 40), random(NUM_ROWS, 20), random(NUM_ROWS, 20), k, v, page_ids, slot, position)

    for dtype in ("float32", "bfloat16", "int8"):
        blocks = functools.partial(block_cases.one_call, shape="many panels")
        kv_dtype = "float32" if dtype == "float32" else "bfloat16"
        add(blocks, *block_cases.make("many panels", dtype, kv_dtype), np.int32(block_cases.NUM_ROWS))

    def sample(logits, token, random, temperature, top_k, top_p, min_p, uniforms):
        everywhere = jnp.ones(NUM_ROWS, bool)
        chosen = native.choose(logits, everywhere, random, temperature, top_k, top_p, min_p, uniforms)
        return chosen, native.report(logits, everywhere, token, everywhere, max_logprobs=5)

    token, top_k = rng.integers(0, 999, (2, NUM_ROWS)).astype(np.int32)
    limits = rng.uniform(0.5, 1, (2, NUM_ROWS)).astype(np.float32)
    uniforms = rng.random((NUM_ROWS, 2), np.float32)
    arguments = token, rng.random(NUM_ROWS) < 0.8, limits[0], top_k, limits[1], np.zeros(NUM_ROWS, np.float32), uniforms
    add(sample, random(NUM_ROWS, 1000) * 2, *arguments)
    return bits.hexdigest()


def num_threads() -> int:
    """Threads of XLA's pool in this process."""
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return names.count("tf_XLAEigen")


if __name__ == "__main__":
    from pallas_kernels.native import library

    reason = library.why_not()
    print(reason or digest(), num_threads())
