"""The native kernels as functions of JAX arrays. Shapes, meanings and results are those of the plain functions named.

Rows from `batch_size` on cost nothing and come back undefined. All run on CPU only, and have no derivatives.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, Num, Shaped

from pallas_kernels.native import library
from pallas_kernels.pages import PagedKV

_LANES = 16
_PANEL = 64  # columns
_INT8_HEAD = 2  # pairs of rows: room for the scales of a panel
_MAX_HEAD_DIM = 256
_MAX_GROUP = 16


def serves(kv: PagedKV, group_size: int) -> bool:
    """Whether attention over these pages can run natively: float32 or bfloat16 without scales."""
    return (
        kv.k.dtype in (jnp.float32, jnp.bfloat16, jnp.uint16)
        and kv.k_scale is None
        and kv.v_scale is None
        and serves_heads(kv.k.shape[3], group_size)
    )


def serves_heads(head_dim: int, group_size: int) -> bool:
    """Whether attention runs natively with `group_size` query heads per kv head."""
    return head_dim % 2 == 0 and head_dim <= _MAX_HEAD_DIM and group_size <= _MAX_GROUP


def pack(w: Num[Array, "K N"]) -> Num[Array, "N/64 K/2 _ _"]:
    """A weight as `product` reads it, zero columns and rows filling it up.

    For each 64 columns all pairs of rows lie together: [N/64, K/2, 64, 2] in bfloat16 and int8, [N/64, K/2, 2, 64] in float32.
    """
    batch_size, num_columns = w.shape
    w = jnp.pad(w, ((0, batch_size % 2), (0, -num_columns % _PANEL)))
    w = w.reshape(w.shape[0] // 2, 2, -1, _PANEL)
    return w.transpose((2, 0, 3, 1) if w.dtype != jnp.float32 else (2, 0, 1, 3))


def pack_gated(w: Float[Array, "K 2 F"]) -> Float[Array, "2F/16 K/2 _ _"]:
    """`pack` of a gate and of what it is applied to, 16 columns of each in turns."""
    return pack(_interleaved(w))


def quantize(w: Float[Array, "K N"]) -> tuple[Int8[Array, "K N"], Float32[Array, " N"]]:
    """Integers from -127 to 127 and a scale per column: q * scale is the weight to within half a scale.

    The largest weight of a column is 127 scales; columns of zeros have the scale 0. A column with a weight that is not finite
    has the scale NaN, and so whatever it is multiplied by.
    """
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=0)
    scale = jnp.where(jnp.isfinite(largest), largest / 127, jnp.nan)
    whole = jnp.where(scale[None] > 0, jnp.round(w / scale[None]), 0)
    return jnp.clip(whole, -127, 127).astype(jnp.int8), scale


def pack_int8(w: Float[Array, "K N"]) -> Int8[Array, "N/64 2+K/2 64 2"]:
    """`pack` of a quantised weight. The bytes of a panel's 64 scales stand in front of it, in the place of two row pairs."""
    integers, scale = quantize(w)
    panels = pack(integers)
    scale = jnp.pad(scale, (0, panels.shape[0] * _PANEL - scale.shape[0]))
    head = lax.bitcast_convert_type(scale, jnp.int8).reshape(-1, _INT8_HEAD, _PANEL, 2)
    return jnp.concatenate([head, panels], axis=1)


def pack_int8_gated(w: Float[Array, "K 2 F"]) -> Int8[Array, "2F/16 2+K/2 64 2"]:
    """`pack_int8` of what `pack_gated` packs."""
    return pack_int8(_interleaved(w))


def _interleaved(w: Float[Array, "K 2 F"]) -> Float[Array, "K 2F"]:
    w = jnp.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % _LANES)))
    w = w.reshape(w.shape[0], 2, -1, _LANES).transpose(0, 2, 1, 3)
    return w.reshape(w.shape[0], -1)


def embed(
    w: Num[Array, "..."], ids: Int32[Array, " B"], size: int, batch_size: Int32[Array, ""] | None = None
) -> Float32[Array, "B K"]:
    """Rows `ids` of a table [V, K]; or, which is the same, columns of the packed weight made of its transpose.

    Natively, because XLA:CPU copies a whole bfloat16 array to gather from it.

    Args:
      w: the table or packed weight.
      ids: in [0, V); what others get is meaningless, but nothing outside of the table is read.
      size: K.
      batch_size: ids that count, as rows in `product`.
    """
    call = _ffi("jaxserve_embed", jax.ShapeDtypeStruct((ids.shape[0], size), jnp.float32))
    return call(w, ids, _count(batch_size, ids.shape[0]))


def product(
    x: Float32[Array, "B K"],
    w: Num[Array, "N/64 K/2 _ _"],
    *,
    num_columns: int,
    batch_size: Int32[Array, ""] | None = None,
    scale: Float32[Array, " K"] | None = None,
    eps: float = 1e-6,
    bias: Float32[Array, " N"] | None = None,
    residual: Float32[Array, "B N"] | None = None,
    gated: bool = False,
) -> Float32[Array, "B N"]:
    """residual + act(norm(x) @ w + bias), operands in the weight's dtype, accumulated in float32; with int8 in bfloat16.

    A row's bits depend on that row only. With AVX-512 BF16 weights of bfloat16 and int8 are multiplied by vdpbf16ps, which
    takes subnormal numbers for zero.

    Args:
      x: rows.
      w: from `pack` or `pack_int8`, or if gated from `pack_gated` or `pack_int8_gated`.
      num_columns: N, or F if gated.
      batch_size: rows that count; None: all.
      scale: of an RMSNorm of x; None: there is none.
      eps: of that.
      bias: [2F] if gated; None: there is none.
      residual: added at last; None: nothing.
      gated: SwiGLU: silu of the gate columns times the others, instead of all columns.
    """
    call = _ffi("jaxserve_product", jax.ShapeDtypeStruct((x.shape[0], num_columns), jnp.float32))
    if residual is None:
        residual = jnp.zeros((0, 0), jnp.float32)
    count = _count(batch_size, x.shape[0])
    return call(x, w, count, _or_none(scale), _or_none(bias), residual, eps=np.float32(eps), gated=gated)


class PagedBatch(NamedTuple):
    """Rows of sequences whose keys and values lie in pages. Called, it is a `jaxserve.models.Attend`."""

    page_ids: Int32[Array, "S P"]  # the page table
    slot: Int32[Array, " B"]  # S: none, the row's keys and values go nowhere
    position: Int32[Array, " B"]
    batch_size: Int32[Array, ""] | None = None  # that count; None: all

    def __call__(
        self, projection: Any, kv: tuple[Array, Array], *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], tuple[Array, Array]]:
        """Writes the rows' keys and values and attends, for weights that are not packed."""
        del layer
        qkv, cos, sin, q_norm, k_norm, norm_eps = projection
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
        pages, rows = PagedKV(*kv, self.page_ids), (self.slot, self.position)
        q, k, v = rotary_write(qkv, cos, sin, pages, *rows, **norms, batch_size=self.batch_size)
        out = paged_attention(q, pages._replace(k=k, v=v), *rows, window=window, batch_size=self.batch_size)
        return out, (k, v)


class BlockWeights(NamedTuple):
    """What a pre-norm block with SwiGLU is made of, as `jaxserve.models.layers` names it; None: there is none."""

    qkv: Num[Array, "N/64 E/2 _ _"]  # for each kv head its G query heads, its key, its value
    qkv_bias: Float[Array, " N"] | None
    out: Num[Array, "E/64 H*D/2 _ _"]
    out_bias: Float[Array, " E"] | None
    gate_up: Num[Array, "2F/64 E/2 _ _"]
    gate_up_bias: Float[Array, "2 F"] | None
    down: Num[Array, "E/64 F/2 _ _"]
    down_bias: Float[Array, " E"] | None
    attention_norm: Float[Array, " E"]  # scales
    ffw_norm: Float[Array, " E"]
    q_norm: Float[Array, " D"] | None
    k_norm: Float[Array, " D"] | None


def blocks(
    x: Float32[Array, "B E"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    weights: Sequence[BlockWeights],
    pages: Sequence[tuple[Shaped[Array, "P K T D"], Shaped[Array, "P K T D"]]],
    rows: PagedBatch,
    *,
    ffw_dim: int,
    group_size: int,
    eps: float,
    windows: Sequence[int | None],
) -> tuple[Float32[Array, "B E"], list[tuple[Array, Array]]]:
    """All blocks of a transformer, bit for bit as `product`, `rotary_write` and `paged_attention` would do one after the other.

    In one call, because with few rows the way from one kernel to the next costs as much as what they do.

    Args:
      x: embedded rows.
      cos, sin: of each row's rotary angles.
      weights: per layer.
      pages: keys and values per layer, written in place.
      rows: where they are.
      ffw_dim: F.
      group_size: G.
      eps: of all norms.
      windows: per layer; None: none.

    Raises:
      ValueError: if a weight is not packed, or is not of the others' dtype, or an array has not the size that fits the rest.
    """
    _check_blocks(x, weights, pages, ffw_dim=ffw_dim, group_size=group_size)
    batch_size, half = x.shape[0], pages[0][0].shape[3] // 2
    found = [array.shape for array in (cos, sin, rows.slot, rows.position)]
    if found != [(batch_size, half)] * 2 + [(batch_size,)] * 2:
        raise ValueError(f"cos, sin, slot and position of {batch_size} rows have the shapes {found}")
    layers = []
    for layer, (k, v) in zip(weights, pages, strict=True):
        layers += [w if w is not None and w.ndim == 4 else _or_none(w) for w in layer] + [k, v]
    head = (x, cos, sin, rows.page_ids, rows.slot, rows.position, _count(rows.batch_size, x.shape[0]))
    stride, first = len(BlockWeights._fields) + 2, len(head) + len(BlockWeights._fields)
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    results += [jax.ShapeDtypeStruct(array.shape, array.dtype) for pair in pages for array in pair]
    aliases = {first + stride * (i // 2) + i % 2: 1 + i for i in range(2 * len(pages))}
    y, *pages = _ffi("jaxserve_blocks", results, input_output_aliases=aliases)(
        *head,
        *layers,
        ffw_dim=np.int64(ffw_dim),
        group_size=np.int64(group_size),
        eps=np.float32(eps),
        windows=np.array([window or 0 for window in windows], np.int64),
    )
    return y, list(zip(pages[::2], pages[1::2], strict=True))


def _check_blocks(x: Any, weights: Any, pages: Any, *, ffw_dim: int, group_size: int) -> None:
    """What the kernel takes for granted."""
    k = pages[0][0]
    (_, num_kv_heads, _, head_dim), embed_dim = k.shape, x.shape[1]
    heads, width = num_kv_heads * group_size * head_dim, num_kv_heads * (group_size + 2) * head_dim
    gated = 2 * -(-ffw_dim // _LANES) * _LANES
    sizes = {
        "qkv": (embed_dim, width),
        "out": (heads, embed_dim),
        "gate_up": (embed_dim, gated),
        "down": (ffw_dim, embed_dim),
    }
    lengths = {"qkv_bias": width, "out_bias": embed_dim, "gate_up_bias": 2 * ffw_dim, "down_bias": embed_dim}
    lengths |= {"attention_norm": embed_dim, "ffw_norm": embed_dim, "q_norm": head_dim, "k_norm": head_dim}
    dtype = weights[0].qkv.dtype
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        raise ValueError(f"packed weights must be float32, bfloat16 or int8, not {dtype}")
    head = _INT8_HEAD if dtype == jnp.int8 else 0
    for number, (layer, arrays) in enumerate(zip(weights, pages, strict=True)):
        for name, w in layer._asdict().items():
            if name in sizes:
                num_inputs, num_columns = sizes[name]
                if w.ndim != 4:
                    raise ValueError(
                        f"{name} is not packed: its shape is {w.shape}; `pack` it, or `prepare` all parameters"
                    )
                wanted = -(-num_columns // _PANEL), head + -(-num_inputs // 2)
                if (w.dtype, w.shape[:2]) != (dtype, wanted):
                    raise ValueError(
                        f"{name} of layer {number} is {w.dtype}{list(w.shape)}, where {dtype}{list(wanted)} and two more axes "
                        "are needed: pack weights of one dtype and of this model"
                    )
            elif w is not None and w.size != lengths[name]:
                raise ValueError(f"{name} of layer {number} has {w.size} elements in place of {lengths[name]}")
        for array in arrays:
            if (array.shape, array.dtype) != (k.shape, k.dtype):
                raise ValueError(
                    f"pages of layer {number} are {array.dtype}{list(array.shape)}, those before {k.dtype}{list(k.shape)}"
                )
    if not serves(PagedKV(k, k, k), group_size):
        raise ValueError(
            f"no native attention over {k.dtype} pages with head_dim={head_dim} and groups of {group_size} heads"
        )


def rotary_write(
    qkv: Float32[Array, "B K G+2 D"],
    cos: Float32[Array, "B D/2"],
    sin: Float32[Array, "B D/2"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    norm_eps: float = 1e-6,
    batch_size: Int32[Array, ""] | None = None,
) -> tuple[Float32[Array, "B H D"], Shaped[Array, "N K T D"], Shaped[Array, "N K T D"]]:
    """`rotary_write.reference.rotary_write` in one pass, pages written in place."""
    num_heads = qkv.shape[1] * (qkv.shape[2] - 2)
    results = (
        jax.ShapeDtypeStruct((qkv.shape[0], num_heads, qkv.shape[3]), jnp.float32),
        jax.ShapeDtypeStruct(kv.k.shape, kv.k.dtype),
        jax.ShapeDtypeStruct(kv.v.shape, kv.v.dtype),
    )
    call = _ffi("jaxserve_rotary_write", results, input_output_aliases={3: 1, 4: 2})
    count = _count(batch_size, qkv.shape[0])
    norms = (_or_none(q_norm), _or_none(k_norm))
    q, k, v = call(qkv, cos, sin, kv.k, kv.v, kv.page_ids, slot, position, count, *norms, eps=np.float32(norm_eps))
    return q, k, v


def paged_attention(
    q: Float[Array, "B H D"],
    kv: PagedKV,
    slot: Int32[Array, " B"],
    position: Int32[Array, " B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float32[Array, " H"] | None = None,
    batch_size: Int32[Array, ""] | None = None,
) -> Float32[Array, "B H D"]:
    """`paged_attention.reference.paged_attention`; adjacent rows of one slot share their reads."""
    call = _ffi("jaxserve_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    count = _count(batch_size, q.shape[0])
    options = {"window": np.int64(window or 0), "softcap": np.float32(softcap or 0)}
    return call(q.astype(jnp.float32), kv.k, kv.v, kv.page_ids, slot, position, count, _or_none(sinks), **options)


def choose(
    logits: Float32[Array, "R V"],
    wanted: Bool[Array, " R"],
    random: Bool[Array, " R"],
    temperature: Float32[Array, " R"],
    top_k: Int32[Array, " R"],
    top_p: Float32[Array, " R"],
    min_p: Float32[Array, " R"],
    uniforms: Float32[Array, "R 2"],
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """A token per wanted row, most likely or drawn, and whether the largest logit is not finite; 0 and False elsewhere."""
    results = (jax.ShapeDtypeStruct(wanted.shape, jnp.int32), jax.ShapeDtypeStruct(wanted.shape, jnp.bool_))
    call = _ffi("jaxserve_choose", results)
    token, failed = call(logits, wanted, random, temperature, top_k, top_p, min_p, uniforms)
    return token, failed


def report(
    logits: Float32[Array, "R V"],
    active: Bool[Array, " R"],
    token: Int32[Array, " R"],
    asked: Bool[Array, " R"],
    *,
    max_logprobs: int,
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R K"], Float32[Array, "R K"]]:
    """Log probability of a token per active row; of rows that ask also its rank, and the most likely tokens with theirs.

    Others get 0, 0, -1 and 0.
    """
    batch_size = token.shape[0]
    results = (
        jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        jax.ShapeDtypeStruct((batch_size, max_logprobs), jnp.int32),
        jax.ShapeDtypeStruct((batch_size, max_logprobs), jnp.float32),
    )
    logprob, rank, ids, values = _ffi("jaxserve_report", results)(logits, active, token, asked)
    return logprob, rank, ids, values


def _ffi(name: str, results: Any, **options: Any) -> Callable[..., Any]:
    """A kernel of the library, which is loaded by now.

    Raises:
      ValueError: if there is none, saying why.
    """
    if (reason := library.why_not()) is not None:
        raise ValueError(f"the native kernels cannot run here: {reason}; or use the backend 'reference'")
    return jax.ffi.ffi_call(name, results, **options)


def _count(batch_size: Int32[Array, ""] | None, every: int) -> Int32[Array, ""]:
    return jnp.asarray(every, jnp.int32) if batch_size is None else batch_size


def _or_none(vector: Any) -> Float32[Array, " _"]:
    return jnp.zeros((0,), jnp.float32) if vector is None else vector.astype(jnp.float32).reshape(-1)
