"""The properties of the TPU kernels alone: copies and buffers (races), tiles and heads in many steps, lowering.

Tiles are made small here, so that little work has many of them.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import chunk_attention, decode_attention, tpu_chunk, tpu_decode, tpu_tiles
from pallas_kernels.paged_attention.query_blocks import query_blocks
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.pallas_kernels.attention_operations import arguments_of
from tests.pallas_kernels.cases import NUM_SLOTS, Case, assert_close, make_case

TILE_SIZE = 16
SHAPE = AttentionShape("small", 6, 2, 8, page_size=8)  # two pages per tile
SMALL_SHAPES = [
    SHAPE,
    AttentionShape("window", 6, 2, 8, page_size=8, window=21),
    AttentionShape("window of one", 3, 3, 8, page_size=16, window=1, sinks=True),
    AttentionShape("two tiles per page", 4, 2, 8, page_size=32, softcap=3.0, sinks=True),
]
attentions = pytest.mark.parametrize("attention", [decode_attention, chunk_attention])
small_shapes = pytest.mark.parametrize("shape", SMALL_SHAPES, ids=lambda shape: shape.name)


@pytest.fixture
def small_tiles(monkeypatch):
    """One kv head per grid step of the chunk kernel, two parts per block, and tiles of a few positions."""
    monkeypatch.setattr(tpu_decode, "_tile_size", lambda kv: TILE_SIZE)
    monkeypatch.setattr(tpu_chunk, "_TILE_SIZE", TILE_SIZE)
    monkeypatch.setattr(tpu_chunk, "_VMEM_BYTES", 0)
    monkeypatch.setattr(tpu_chunk, "_PART_QUERIES", 48)
    monkeypatch.setattr(tpu_chunk, "_BLOCK_QUERIES", 96)


def case_for(attention, shape: AttentionShape, num_positions: int = 48, dtype: str = "float32", seed: int = 0) -> Case:
    """Poisoned, with prompts of up to `num_positions`."""
    chunks, pages_per_slot = attention is chunk_attention, max(num_positions // shape.page_size, 2)
    case = make_case(shape, dtype, chunks=chunks, seed=seed, pages_per_slot=pages_per_slot, max_rows_per_slot=40)
    return case.poisoned()


def runner(attention, shape: AttentionShape, interpret: bool = True):
    options = {"window": shape.window, "softcap": shape.softcap, "backend": "tpu", "interpret": interpret}
    attend = jax.jit(functools.partial(attention, **options))
    return lambda case: np.asarray(attend(*case.rows, sinks=case.options["sinks"]))


def run(attention, case: Case, interpret: bool = True) -> np.ndarray:
    return runner(attention, case.shape, interpret)(case)


def num_races(attention, case: Case, capsys, **params) -> int:
    """Accesses that the interpreter finds not to be ordered. By default it has one clock for all copies, and finds none."""
    capsys.readouterr()
    params = pltpu.InterpretParams(detect_races=True, vector_clock_size=1000, **params)
    with pltpu.force_tpu_interpret_mode(params):
        run(attention, case, interpret=False)
    return capsys.readouterr().out.count("RACE DETECTED")


@small_shapes
@attentions
def test_many_tiles_per_row_and_grid_steps_per_block(attention, shape, small_tiles):
    case = case_for(attention, shape, num_positions=96)
    out = run(attention, case)
    assert_close(out, case)
    assert not out[case.slot == NUM_SLOTS].any()


# The chunk kernel takes float8_e4m3fn the way of bfloat16, which other tests show.
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (decode_attention, "uint16"),
        (decode_attention, "int8"),
        (decode_attention, "float8_e4m3fn"),
        (chunk_attention, "uint16"),
        (chunk_attention, "int8"),
    ],
)
def test_tiles_of_every_dtype(attention, dtype, small_tiles):
    case = case_for(attention, SHAPE, dtype=dtype)
    assert_close(run(attention, case), case, "bfloat16")


def test_bits_of_a_row_of_many_tiles_do_not_depend_on_other_rows(small_tiles):
    case = case_for(decode_attention, SMALL_SHAPES[1], num_positions=96, seed=2)
    attend = runner(decode_attention, case.shape)
    expected = attend(case)
    for row in np.flatnonzero(case.position > 2 * TILE_SIZE):
        alone = np.where(np.arange(len(case.slot)) == row, case.slot, NUM_SLOTS)
        np.testing.assert_array_equal(attend(case.replace(slot=alone))[row], expected[row])


def test_bits_of_a_chunk_of_many_tiles_do_not_depend_on_its_cuts_nor_on_what_a_grid_step_works_on(
    small_tiles, monkeypatch
):
    case = case_for(chunk_attention, SMALL_SHAPES[1], num_positions=64, seed=2)
    attend = runner(chunk_attention, case.shape)
    expected, rows = attend(case), np.flatnonzero(case.slot == 0)
    assert len(rows) == 40
    for part in (rows[:7], rows[7:], rows[13:14]):
        alone = np.where(np.isin(np.arange(len(case.slot)), part), case.slot, NUM_SLOTS)
        np.testing.assert_array_equal(attend(case.replace(slot=alone))[part], expected[part])
    monkeypatch.setattr(tpu_chunk, "_VMEM_BYTES", 10**9)  # all kv heads
    monkeypatch.setattr(tpu_chunk, "_BLOCK_QUERIES", 48)  # one part
    np.testing.assert_array_equal(run(chunk_attention, case), expected)


@attentions
@pytest.mark.parametrize("shape", SMALL_SHAPES[1::2], ids=lambda shape: shape.name)
def test_no_copy_races_with_what_is_computed_on(attention, shape, small_tiles, capsys):
    assert num_races(attention, case_for(attention, shape), capsys) == 0


@attentions
def test_a_copy_to_the_buffer_in_use_is_found_to_race(attention, small_tiles, capsys, monkeypatch):
    for_each_copy = tpu_tiles.Tiles._for_each_copy

    def to_one_buffer(self, item, first_head, tile, buffer, act):
        for_each_copy(self, item, first_head, tile, 0, act)

    monkeypatch.setattr(tpu_tiles.Tiles, "_for_each_copy", to_one_buffer)
    assert num_races(attention, case_for(attention, SHAPE), capsys) > 0


@attentions
def test_waits_left_out_are_found_to_race(attention, small_tiles, capsys, monkeypatch):
    make_async_copy = pltpu.make_async_copy

    def never_awaited(*places):
        return types.SimpleNamespace(start=make_async_copy(*places).start, wait=lambda: None)

    monkeypatch.setattr(pltpu, "make_async_copy", never_awaited)
    assert num_races(attention, case_for(attention, SHAPE), capsys, dma_execution_mode="eager") > 0


@attentions
def test_it_runs_outside_of_jit(attention, small_tiles):
    case = case_for(attention, SHAPE, num_positions=16)
    assert_close(attention(*case.rows, **case.options, backend="tpu", interpret=True), case)


@pytest.mark.parametrize("group_size", [1, 3, 4, 71])
def test_every_row_of_a_block_has_a_place_in_units_of_its_own(group_size):
    rows = tpu_chunk._Rows.of(group_size)
    assert rows.per_block == tpu_chunk.block_rows(group_size)
    assert rows.per_block % rows.per_part == rows.per_part % rows.per_unit == 0
    assert rows.per_unit * group_size % 16 == 0
    rng = np.random.default_rng(group_size)
    lengths = rng.integers(1, 2 * rows.per_block, 5)
    slot = np.repeat([3, 5, 0, 5, 4], lengths).astype(np.int32)  # 5: none
    position = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    blocks = query_blocks(jnp.asarray(slot), jnp.asarray(position), num_slots=5, block_rows=rows.per_block)
    layout = tpu_chunk._layout(blocks, len(slot), 5, rows)
    row, place = np.asarray(layout.row), np.asarray(layout.place)
    np.testing.assert_array_equal(row[place[slot < 5]], np.flatnonzero(slot < 5))
    assert (place[slot == 5] == len(row)).all()
    assert np.count_nonzero(row < len(slot)) == np.count_nonzero(slot < 5)
    for first_row, num_rows, of_slot, first_unit in zip(
        *map(np.asarray, (*blocks[:3], layout.first_unit)), strict=True
    ):
        assert first_unit * rows.per_unit + rows.per_block <= len(row)  # what is read
        if num_rows and of_slot < 5:
            np.testing.assert_array_equal(
                place[first_row : first_row + num_rows], first_unit * rows.per_unit + np.arange(num_rows)
            )


def lowered(attention, shape: AttentionShape, dtype: str):
    """StableHLO for a TPU, made without one."""
    options = {"window": shape.window, "softcap": shape.softcap, "backend": "tpu"}
    traced = jax.jit(functools.partial(attention, **options)).trace(*arguments_of(shape, dtype))
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@attentions
@pytest.mark.parametrize(
    ("name", "dtype", "element"),
    [
        ("llama3-8b", "bfloat16", "bf16"),
        ("gemma2-2b", "float32", "f32"),
        ("gpt-oss-20b", "int8", "i8"),
        ("qwen2-0.5b", "uint16", "ui16"),
        ("phi-2", "float8_e4m3fn", "f8E4M3FN"),
        ("mistral-7b-window", "float8_e5m2", "f8E5M2"),
    ],
)
def test_it_lowers_to_one_kernel_that_reads_the_pool_as_it_is(attention, name, dtype, element):
    shape = SHAPES[name]
    lines = lowered(attention, shape, dtype).splitlines()
    pool = f"tensor<9x{shape.num_kv_heads}x{shape.page_size}x{shape.head_dim}x{element}>"
    with_pool = [line for line in lines if pool in line and "func.func" not in line]
    (kernel,) = (line for line in lines if "tpu_custom_call" in line)
    assert with_pool == [kernel]
    assert re.sub(r'".*"', "", kernel).count(pool) == 2
