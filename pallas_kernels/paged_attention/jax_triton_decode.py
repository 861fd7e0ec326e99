"""`triton_decode` written in Triton itself and called through jax-triton, with the same tiles and splits.

It can replace `triton_decode` if Pallas drops its lowering to Triton.
"""

import functools
import inspect
from types import ModuleType
from typing import Any

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import triton_decode
from pallas_kernels.paged_attention import triton_tiles as tiles
from pallas_kernels.pages import PagedKV


def decode_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    num_splits: int | None = None,
    compute_capability: int | None = None,
) -> Float32[Array, "B H D"]:
    """Computes the same result as `triton_decode.decode_attention`.

    Args:
      q, kv, slot, position, window, softcap, sinks, num_splits: as in `triton_decode`.
      compute_capability: compute capability, times ten, of the GPU to compile for; None: that of the device. Give it to
        compile without a GPU.

    Raises:
      ValueError: if jax-triton is not installed, or the shapes, the dtype of the pages or `num_splits` are not supported.
    """
    _, kernels = _imported()
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[1]
    plan = triton_decode.plan_of(q, kv, window=window, num_splits=num_splits)
    kv = kv._replace(k=tiles.kernel_pages(kv.k), v=tiles.kernel_pages(kv.v))
    # Where an array is None, another one takes its place; kernels do not read it.
    k_scale, v_scale, sink = (slot if x is None else x for x in (kv.k_scale, kv.v_scale, sinks))
    constants = {
        "NUM_SLOTS": kv.num_slots,
        "NUM_SPLITS": plan.num_splits,
        "GROUP_SIZE": num_heads // num_kv_heads,
        "TILE": plan.tile_size,
        "HEAD_DIM": head_dim,
        "WINDOW": window,
    }
    attending = constants | {
        "PAGES_PER_SLOT": kv.page_ids.shape[1],
        "NUM_KV_HEADS": num_kv_heads,
        "HEADS_PER_PROGRAM": plan.heads_per_program,
        "PAGE_SIZE": kv.page_size,
        "PADDED_DIM": tiles.padded(head_dim),
        "COMPUTE": getattr(kernels.tl, tiles.compute_dtype(kv.k.dtype).name),
        "QUERY_FACTOR": tiles.query_factor(softcap),
        "SOFTCAP": None if softcap is None else softcap * tiles.LOG2_E,
        "HAS_K_SCALE": kv.k_scale is not None,
    }
    finishing = {"HAS_SINKS": sinks is not None, "HAS_V_SCALE": kv.v_scale is not None}

    call = functools.partial(_call, compute_capability=compute_capability)
    programs = (plan.head_programs, num_rows)
    rows = (q, kv.k, kv.v, kv.page_ids, slot, position, k_scale)
    if plan.num_splits == 1:
        return call("decode_whole", (*rows, v_scale, sink), plan.out_shape, programs, 3, **attending, **finishing)
    parts = call("decode_split", rows, plan.part_shapes, (*programs, plan.num_splits), 3, **attending)
    block_dim = min(tiles.padded(head_dim), triton_decode.COMBINED_DIMS)
    return call(
        "combine",
        (*parts, slot, position, v_scale, sink),
        plan.out_shape,
        (num_heads, num_rows, -(-head_dim // block_dim)),
        1,
        **constants,
        **finishing,
        NUM_HEADS=num_heads,
        BLOCK_DIM=block_dim,
        PADDED_SPLITS=tiles.padded(plan.num_splits, 1),
    )


def _call(
    kernel: str,
    arrays: tuple[Array, ...],
    out: Any,
    grid: tuple[int, ...],
    num_stages: int,
    *,
    compute_capability: int | None,
    **constants: Any,
) -> Any:
    """Calls a kernel through jax-triton."""
    jax_triton, kernels = _imported()
    is_named_type = "out_type" in inspect.signature(jax_triton.triton_call).parameters  # from 0.4 on
    return jax_triton.triton_call(
        *arrays,
        kernel=getattr(kernels, kernel),
        grid=grid,
        name=f"paged_{kernel}",
        num_warps=4,
        num_stages=num_stages,
        compute_capability=compute_capability,
        **{"out_type" if is_named_type else "out_shape": out},
        **constants,
    )


def _imported() -> tuple[ModuleType, ModuleType]:
    """Imports jax-triton and the kernels, on first use only."""
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]

        from pallas_kernels.paged_attention import jax_triton_kernels
    except ImportError as error:
        raise ValueError(
            f"backend 'jax_triton' needs jax-triton ({error}): pip install \"jaxserve[triton]\", or use backend 'triton'"
        ) from error
    return jax_triton, jax_triton_kernels
