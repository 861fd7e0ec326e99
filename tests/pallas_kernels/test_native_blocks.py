"""All blocks in one native call: bit for bit what the kernels do one by one, which have tests of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.native import library
from pallas_kernels.paged_attention import PagedKV

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

EPS, NUM_ROWS, NUM_SLOTS, PAGE_SIZE, PAGES_PER_SLOT = 1e-5, 23, 5, 8, 6
# (embed_dim, num_kv_heads, group_size, head_dim, ffw_dim, windows): heads and sizes that fill vectors, and that do not.
SHAPES = {
    "whole vectors": (64, 2, 3, 64, 160, (None, None)),
    "odd sizes": (31, 1, 7, 6, 37, (None, 9)),
    "many panels": (48, 3, 1, 20, 800, (5, None, 11)),
    "wide heads": (96, 1, 4, 128, 64, (None,)),
}
shapes = pytest.mark.parametrize("shape", SHAPES)
weight_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
page_dtypes = pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])


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


def assert_same(actual: Any, expected: Any, batch_size: int = NUM_ROWS) -> None:
    assert np.isfinite(np.asarray(expected[0])[:batch_size]).all()
    np.testing.assert_array_equal(np.asarray(actual[0])[:batch_size], np.asarray(expected[0])[:batch_size])
    for new, old in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


@page_dtypes
@weight_dtypes
@shapes
def test_one_call_is_the_kernels_one_by_one(shape, dtype, kv_dtype):
    for parts in (True, False):
        arguments = make(shape, dtype, kv_dtype, parts=parts)
        for batch_size in (NUM_ROWS, 12, 1):
            count = np.int32(batch_size)
            expected = one_by_one(*arguments, count, shape=shape)
            assert_same(one_call(*arguments, count, shape=shape), expected, batch_size)
    first, last = (jax.tree.leaves(pages)[0] for pages in (arguments[4], expected[1]))
    assert (np.asarray(first) != np.asarray(last)).any()  # something was written


@weight_dtypes
def test_a_row_is_the_same_whatever_is_beside_it(dtype):
    *head, slot, position = make("whole vectors", dtype, "bfloat16")
    x, cos, sin, *rest = head
    whole = np.asarray(one_call(*head, slot, position, np.int32(NUM_ROWS), shape="whole vectors")[0])
    for row in (11, 12, 13, 14):  # each reads pages of its own
        order = np.r_[row, np.delete(np.arange(NUM_ROWS), row)]
        moved = (x[order], cos[order], sin[order], *rest, slot[order], position[order])
        for batch_size in (1, 7, NUM_ROWS):
            out = np.asarray(one_call(*moved, np.int32(batch_size), shape="whole vectors")[0])
            np.testing.assert_array_equal(out[0], whole[row])


def test_no_rows_leave_the_pages_alone():
    arguments = make("odd sizes", "bfloat16", "bfloat16")
    for count in (0, -3):
        _, pages = one_call(*arguments, np.int32(count), shape="odd sizes")
        for new, old in zip(jax.tree.leaves(pages), jax.tree.leaves(arguments[4]), strict=True):
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def test_layers_that_do_not_fit_their_windows_are_refused():
    x, cos, sin, layers, pages, page_ids, slot, position = make("odd sizes", "float32", "float32")
    rows = native.PagedBatch(page_ids, slot, position)
    options: dict[str, Any] = {"group_size": 7, "ffw_dim": 37, "eps": EPS}
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit the number of layers"):
        jax.block_until_ready(native.blocks(x, cos, sin, layers, pages, rows, windows=(None,), **options))
    with pytest.raises(ValueError, match="shorter"):
        native.blocks(x, cos, sin, layers, pages[:1], rows, windows=(None, None), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": jnp.ones((42, 31))}, r"out is not packed: its shape is \(42, 31\); `pack` it"),
        (
            {"down": native.pack(jnp.ones((37, 31), jnp.bfloat16))},
            r"down of layer 1 is bfloat16.*where float32\[1, 19\]",
        ),
        (
            {"gate_up": native.pack_gated(jnp.ones((31, 2, 99)))},
            r"gate_up of layer 1 is float32\[4, 16, 2, 64\].*\[2, 16\]",
        ),
        (
            {"down": native.pack_int8(jnp.ones((37, 31)))},
            r"down of layer 1 is int8\[1, 21, 64, 2\], where float32\[1, 19\]",
        ),
        ({"q_norm": jnp.ones(8)}, "q_norm of layer 1 has 8 elements, but this model needs 6"),
        ({"down_bias": jnp.ones(30)}, "down_bias of layer 1 has 30 elements, but this model needs 31"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    x, cos, sin, layers, pages, page_ids, slot, position = make("odd sizes", "float32", "float32")
    rows = native.PagedBatch(page_ids, slot, position)
    options: dict[str, Any] = {"group_size": 7, "ffw_dim": 37, "eps": EPS, "windows": (None, 9)}
    with pytest.raises(ValueError, match=message):
        native.blocks(x, cos, sin, [layers[0], layers[1]._replace(**change)], pages, rows, **options)
    with pytest.raises(ValueError, match=r"have the shapes .*\(22,\).*x has 23 batch rows"):
        native.blocks(x, cos, sin, layers, pages, rows._replace(position=position[1:]), **options)
    other = [pages[0], tuple(array.astype(jnp.bfloat16) for array in pages[1])]
    with pytest.raises(ValueError, match="pages of layer 1 are bfloat16.*those of layer 0 float32"):
        native.blocks(x, cos, sin, layers, other, rows, **options)
    half = [tuple(array.astype(jnp.float16) for array in arrays) for arrays in pages]
    with pytest.raises(ValueError, match="no native attention over float16 pages"):
        native.blocks(x, cos, sin, layers, half, rows, **options)
