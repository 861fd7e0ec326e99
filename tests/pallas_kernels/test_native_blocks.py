"""All blocks in one native call: bit for bit what the kernels do one by one, which have tests of their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.native import library
from tests.pallas_kernels.block_cases import EPS, NUM_ROWS, SHAPES, make, one_by_one, one_call

pytestmark = pytest.mark.skipif(not library.available(), reason=f"native kernels: {library.why_not()}")

shapes = pytest.mark.parametrize("shape", SHAPES)
weight_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
page_dtypes = pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])


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
