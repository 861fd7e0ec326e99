"""The limits on queries and pages that the Pallas kernels for GPUs and for TPUs share."""

from jaxtyping import Array, Float

from pallas_kernels.pages import PagedKV

MAX_HEAD_DIM = 256  # beyond it the accumulators do not fit
_MIN_PAGE_SIZE = 8


def check_shapes(q: Float[Array, "B H D"], kv: PagedKV) -> None:
    """Refuses shapes that no kernel works on.

    Raises:
      ValueError: naming the value, the rule and the remedy.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = kv.k.shape
    if kv.v.shape != kv.k.shape or kv.v.dtype != kv.k.dtype:
        raise ValueError(
            f"pages of keys are {kv.k.dtype}{list(kv.k.shape)}, of values {kv.v.dtype}{list(kv.v.shape)}: make them alike"
        )
    if head_dim != kv.k.shape[3]:
        raise ValueError(f"head_dim of queries is {head_dim}, of pages {kv.k.shape[3]}: make them alike")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {MAX_HEAD_DIM}: use backend 'reference'")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads: repeat kv heads")
    if page_size < _MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is no power of two of at least {_MIN_PAGE_SIZE}: choose one")
