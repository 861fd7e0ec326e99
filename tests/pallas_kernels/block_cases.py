"""Blocks with random weights, for the tests of native kernels: in one call, and as one kernel after the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.paged_attention import PagedKV

EPS, NUM_ROWS, NUM_SLOTS, PAGE_SIZE, PAGES_PER_SLOT = 1e-5, 23, 5, 8, 6
# (embed_dim, num_kv_heads, group_size, head_dim, ffw_dim, windows): heads and sizes that fill vectors, and that do not.
SHAPES = {
    "whole vectors": (64, 2, 3, 64, 160, (None, None)),
    "odd sizes": (31, 1, 7, 6, 37, (None, 9)),
    "many panels": (48, 3, 1, 20, 800, (5, None, 11)),
    "wide heads": (96, 1, 4, 128, 64, (None,)),
}


@functools.cache
def make(shape: str, dtype: str, kv_dtype: str, *, parts: bool = True) -> tuple[Any, ...]:
    """Arguments of `one_call`; `parts`: biases and norms of heads are there."""
    embed_dim, num_kv_heads, group_size, head_dim, ffw_dim, windows = SHAPES[shape]
    rng = np.random.default_rng(0)
    width, heads = num_kv_heads * (group_size + 2) * head_dim, num_kv_heads * group_size * head_dim

    def random(*sizes: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(sizes), jnp.float32)

    def weight(*sizes: int) -> jax.Array:
        return random(*sizes, scale=sizes[0] ** -0.5).astype("float32" if dtype == "int8" else dtype)

    pack, pack_gated = (
        (native.pack_int8, native.pack_int8_gated) if dtype == "int8" else (native.pack, native.pack_gated)
    )

    def maybe(*sizes: int) -> jax.Array | None:
        return 1 + random(*sizes, scale=0.3) if parts else None

    layers = [
        native.BlockWeights(
            qkv=pack(weight(embed_dim, width)),
            qkv_bias=maybe(width),
            out=pack(weight(heads, embed_dim)),
            out_bias=maybe(embed_dim),
            gate_up=pack_gated(weight(embed_dim, 2, ffw_dim)),
            gate_up_bias=maybe(2, ffw_dim),
            down=pack(weight(ffw_dim, embed_dim)),
            down_bias=maybe(embed_dim),
            attention_norm=1 + random(embed_dim, scale=0.3),
            ffw_norm=1 + random(embed_dim, scale=0.3),
            q_norm=maybe(head_dim),
            k_norm=maybe(head_dim),
        )
        for _ in windows
    ]
    num_pages = NUM_SLOTS * PAGES_PER_SLOT
    pages = [
        tuple(random(num_pages, num_kv_heads, PAGE_SIZE, head_dim).astype(kv_dtype) for _ in range(2)) for _ in windows
    ]
    angles = rng.uniform(-3, 3, (NUM_ROWS, head_dim // 2))
    # A prompt in the middle of which a vector of keys ends, single rows, and one of no slot.
    slot = np.array([0] * 11 + [1, 2, 4, NUM_SLOTS] + [3] * 8, np.int32)
    position = np.array([*range(9, 20), 0, 47, 15, 3, *range(8)], np.int32)
    page_ids = rng.permutation(num_pages).reshape(NUM_SLOTS, PAGES_PER_SLOT).astype(np.int32)
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return random(NUM_ROWS, embed_dim), cos, sin, layers, pages, page_ids, slot, position


@functools.partial(jax.jit, static_argnames="shape")
def one_call(x, cos, sin, layers, pages, page_ids, slot, position, batch_size, *, shape: str):
    *_, group_size, _, ffw_dim, windows = SHAPES[shape]
    rows = native.PagedBatch(page_ids, slot, position, batch_size)
    options: dict[str, Any] = {"group_size": group_size, "ffw_dim": ffw_dim, "windows": windows}
    return native.blocks(x, cos, sin, layers, pages, rows, eps=EPS, **options)


@functools.partial(jax.jit, static_argnames="shape")
def one_by_one(x, cos, sin, layers, pages, page_ids, slot, position, batch_size, *, shape: str):
    embed_dim, num_kv_heads, group_size, head_dim, ffw_dim, windows = SHAPES[shape]
    counted: dict[str, Any] = {"batch_size": batch_size}
    new_pages = []
    for w, (k, v), window in zip(layers, pages, windows, strict=True):
        width = num_kv_heads * (group_size + 2) * head_dim
        norm = {"scale": w.attention_norm, "eps": EPS, **counted}
        qkv = native.product(x, w.qkv, num_columns=width, bias=w.qkv_bias, **norm)
        qkv = qkv.reshape(-1, num_kv_heads, group_size + 2, head_dim)
        kv = PagedKV(k, v, page_ids)
        norms = {"q_norm": w.q_norm, "k_norm": w.k_norm, "norm_eps": EPS}
        q, k, v = native.rotary_write(qkv, cos, sin, kv, slot, position, **norms, **counted)
        out = native.paged_attention(q, kv._replace(k=k, v=v), slot, position, window=window, **counted)
        out = out.reshape(x.shape[0], -1)
        x = native.product(out, w.out, num_columns=embed_dim, bias=w.out_bias, residual=x, **counted)
        norm = {"scale": w.ffw_norm, "eps": EPS, **counted}
        bias = None if w.gate_up_bias is None else w.gate_up_bias.reshape(-1)
        y = native.product(x, w.gate_up, num_columns=ffw_dim, bias=bias, gated=True, **norm)
        x = native.product(y, w.down, num_columns=embed_dim, bias=w.down_bias, residual=x, **counted)
        new_pages.append((k, v))
    return x, new_pages
