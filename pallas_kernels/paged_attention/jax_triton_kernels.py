"""The kernels of `triton_decode`, written in Triton itself. Importing this file imports triton.

Arrays are pointers to their first element; shapes and options are compile-time constants. Where a constant `HAS_...` is False,
the pointer may be any. `triton_decode` and `triton_tiles` explain the method.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def decode_whole(
    q,  # [B, H, D]
    k_pages,  # [N, K, T, D]
    v_pages,
    page_ids,  # [S, P]
    slots,  # [B]
    positions,  # [B]
    k_scale,  # [K]
    v_scale,
    sinks,  # [H]
    out,  # [B, H, D]
    NUM_SLOTS: tl.constexpr,
    PAGES_PER_SLOT: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUERY_FACTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,  # in base 2; None: no softcap
    WINDOW: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # 1
):
    """A program works on one kv head of one batch row, and all positions that it sees. Grid: (kv heads, batch rows)."""
    row = tl.program_id(1)
    kv_head, head, is_head = _heads(GROUP_SIZE, HEADS_PER_PROGRAM)
    slot = tl.load(slots + row)
    last = _last_seen(slot, tl.load(positions + row), NUM_SLOTS)
    first, end, _ = _split_tiles(last, WINDOW, TILE, NUM_SPLITS)
    largest, total, acc = _attend(
        q, k_pages, v_pages, page_ids, k_scale, row, slot, last, kv_head, head, is_head, first, end,
        PAGES_PER_SLOT, NUM_KV_HEADS, GROUP_SIZE, HEADS_PER_PROGRAM, PAGE_SIZE, TILE, HEAD_DIM, PADDED_DIM,
        COMPUTE, QUERY_FACTOR, SOFTCAP, WINDOW, HAS_K_SCALE,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_head, other=0.0)
        total, acc = _with_sink(largest, total, acc, sink)
    if HAS_V_SCALE:
        acc = acc * tl.load(v_scale + kv_head)
    dim = tl.arange(0, PADDED_DIM)
    offset = (row * (NUM_KV_HEADS * GROUP_SIZE) + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out + offset, _normalised(total, acc), mask=is_head[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def decode_split(
    q,
    k_pages,
    v_pages,
    page_ids,
    slots,
    positions,
    k_scale,
    largest_parts,  # [B, H, splits]
    total_parts,
    out_parts,  # [B, H, splits, D]
    NUM_SLOTS: tl.constexpr,
    PAGES_PER_SLOT: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUERY_FACTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """A program works like `decode_whole` on one split of the positions. Grid: (kv heads, batch rows, splits)."""
    row, split = tl.program_id(1), tl.program_id(2)
    kv_head, head, is_head = _heads(GROUP_SIZE, HEADS_PER_PROGRAM)
    slot = tl.load(slots + row)
    last = _last_seen(slot, tl.load(positions + row), NUM_SLOTS)
    first, end, per_split = _split_tiles(last, WINDOW, TILE, NUM_SPLITS)
    first = first + split * per_split
    end = tl.minimum(first + per_split, end)
    if first < end:  # `combine` reads only these
        largest, total, acc = _attend(
            q, k_pages, v_pages, page_ids, k_scale, row, slot, last, kv_head, head, is_head, first, end,
            PAGES_PER_SLOT, NUM_KV_HEADS, GROUP_SIZE, HEADS_PER_PROGRAM, PAGE_SIZE, TILE, HEAD_DIM, PADDED_DIM,
            COMPUTE, QUERY_FACTOR, SOFTCAP, WINDOW, HAS_K_SCALE,
        )  # fmt: skip
        part = (row.to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + head) * NUM_SPLITS + split
        tl.store(largest_parts + part, largest, mask=is_head)
        tl.store(total_parts + part, total, mask=is_head)
        dim = tl.arange(0, PADDED_DIM)
        offset = part[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_parts + offset, acc, mask=is_head[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def combine(
    largest_parts,
    total_parts,
    out_parts,
    slots,
    positions,
    v_scale,
    sinks,
    out,
    NUM_SLOTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """A program combines the splits of one head of one batch row. Grid: (heads, batch rows, blocks of the head dim)."""
    head, row = tl.program_id(0), tl.program_id(1)
    dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    split = tl.arange(0, PADDED_SPLITS)
    last = _last_seen(tl.load(slots + row), tl.load(positions + row), NUM_SLOTS)
    first, end, per_split = _split_tiles(last, WINDOW, TILE, NUM_SPLITS)
    is_used = (first + split * per_split < end) & (split < NUM_SPLITS)
    part = (row.to(tl.int64) * NUM_HEADS + head) * NUM_SPLITS + split
    largest = tl.load(largest_parts + part, mask=is_used, other=float("-inf"))
    total = tl.load(total_parts + part, mask=is_used, other=0.0)
    is_element = is_used[:, None] & (dim < HEAD_DIM)[None, :]
    acc = tl.load(out_parts + part[:, None] * HEAD_DIM + dim[None, :], mask=is_element, other=0.0)

    overall = tl.max(largest, axis=0)
    correction = tl.exp2(largest - _finite_base(overall))
    total = tl.sum(total * correction, axis=0)
    acc = tl.sum(acc * correction[:, None], axis=0)
    if HAS_SINKS:
        total, acc = _with_sink(overall, total, acc, tl.load(sinks + head))
    if HAS_V_SCALE:
        acc = acc * tl.load(v_scale + head // GROUP_SIZE)
    tl.store(out + (row * NUM_HEADS + head) * HEAD_DIM + dim, _normalised(total, acc), mask=dim < HEAD_DIM)


@triton.jit
def _heads(GROUP_SIZE: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr):
    """Returns the kv head of the program, its query heads, and which of them exist."""
    programs_per_kv_head: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    kv_head = tl.program_id(0) // programs_per_kv_head
    member = (tl.program_id(0) % programs_per_kv_head) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
    return kv_head, kv_head * GROUP_SIZE + member, member < GROUP_SIZE


@triton.jit
def _last_seen(slot, position, NUM_SLOTS: tl.constexpr):
    """Returns the last position that a batch row sees. Without a slot it is -1, so that no page id is read."""
    return tl.where(slot < NUM_SLOTS, position, -1)


@triton.jit
def _split_tiles(last, WINDOW: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Returns the first tile that a batch row sees, the tile after its last one, and the tiles per split."""
    first = last * 0
    if WINDOW is not None:
        first = tl.maximum(last - (WINDOW - 1), 0) // TILE
    end = (last + TILE) // TILE
    return first, end, (end - first + (NUM_SPLITS - 1)) // NUM_SPLITS


@triton.jit
def _attend(
    q, k_pages, v_pages, page_ids, k_scale, row, slot, last, kv_head, head, is_head, first, end,
    PAGES_PER_SLOT: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, COMPUTE: tl.constexpr, QUERY_FACTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, HAS_K_SCALE: tl.constexpr,
):  # fmt: skip
    """Folds tiles first to end - 1. Returns the largest score, the sum of weights, and the weighted sum of values."""
    dim = tl.arange(0, PADDED_DIM)
    q_offset = (row * (NUM_KV_HEADS * GROUP_SIZE) + head)[:, None] * HEAD_DIM + dim[None, :]
    q_tile = tl.load(q + q_offset, mask=is_head[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    q_tile = (q_tile.to(tl.float32) * QUERY_FACTOR).to(COMPUTE)
    largest = tl.full([HEADS_PER_PROGRAM], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_PER_PROGRAM], tl.float32)
    acc = tl.zeros([HEADS_PER_PROGRAM, PADDED_DIM], tl.float32)
    ids = _page_ids_of(first, page_ids, slot, last, PAGES_PER_SLOT, PAGE_SIZE, TILE)
    for tile in range(first, end):
        next_ids = _page_ids_of(tile + 1, page_ids, slot, last, PAGES_PER_SLOT, PAGE_SIZE, TILE)
        key_positions = tile * TILE + tl.arange(0, TILE)
        visible = key_positions <= last
        if WINDOW is not None:
            visible = visible & (key_positions > last - WINDOW)
        offset = _tile_offset(ids, kv_head, key_positions, NUM_KV_HEADS, PAGE_SIZE, TILE, HEAD_DIM, PADDED_DIM)
        inside = visible[:, None]
        if PADDED_DIM != HEAD_DIM:
            inside = inside & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_pages + offset, mask=inside, other=0.0).to(COMPUTE)
        v = tl.load(v_pages + offset, mask=inside, other=0.0).to(COMPUTE)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        if HAS_K_SCALE:
            scores = scores * tl.load(k_scale + kv_head)
        if SOFTCAP is not None:
            scores = SOFTCAP - (2 * SOFTCAP) / (tl.exp2(scores) + 1)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = _finite_base(new_largest)
        weights = tl.exp2(scores - base[:, None])
        correction = tl.exp2(largest - base)
        total = total * correction + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(COMPUTE), v, acc * correction[:, None], input_precision="ieee")
        largest = new_largest
        ids = next_ids
    return largest, total, acc


@triton.jit
def _page_ids_of(tile, page_ids, slot, last, PAGES_PER_SLOT: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Returns the page of each position of a tile, or a scalar if all lie in one page."""
    positions = tile * TILE
    if PAGE_SIZE < TILE:
        positions = positions + tl.arange(0, TILE)
    return tl.load(page_ids + slot * PAGES_PER_SLOT + positions // PAGE_SIZE, mask=positions <= last, other=0)


@triton.jit
def _tile_offset(
    ids, kv_head, positions, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    if PAGE_SIZE < TILE:
        ids = ids[:, None]
    row = (ids * NUM_KV_HEADS + kv_head) * PAGE_SIZE + (positions % PAGE_SIZE)[:, None]
    return row * HEAD_DIM + tl.arange(0, PADDED_DIM)[None, :]


@triton.jit
def _with_sink(largest, total, acc, sink):
    sink = sink * 1.4426950408889634  # log2(e): users give sinks in base e
    base = _finite_base(tl.maximum(largest, sink))
    correction = tl.exp2(largest - base)
    total = total * correction + tl.exp2(sink - base)
    return total, acc * (correction[:, None] if len(acc.shape) == 2 else correction)


@triton.jit
def _normalised(total, acc):
    """Divides by the sum of weights; a batch row that saw nothing gets 0."""
    if len(acc.shape) == 2:
        total = total[:, None]
    return tl.where(total == 0, 0.0, acc / total)


@triton.jit
def _finite_base(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)
