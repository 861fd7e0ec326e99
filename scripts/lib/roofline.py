"""The least work of steps, in FLOPs and bytes, and the least time in which a machine with given peaks could do it.

    a step's floor = max(FLOPs / matmul rate, bytes / bandwidth)

FLOPs count the blocks' matrices for every batch row, the output projection for every row that draws a token, and attention over
the positions that each row sees. Bytes count the weights once, the keys and values that each sequence's rows see once, and the
new keys and values. Norms, softmax, sampling and the host cost nothing here. The steps are the recorded ones, with the batch
rows that the scheduler gave them.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxserve import ModelConfig
from jaxserve.models.params import Path, abstract_params, leaves_with_paths, weight_dtype
from jaxserve.timeline.record import Steps


@dataclasses.dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of each of n steps."""

    flops: Int64[np.ndarray, " n"]
    num_bytes: Int64[np.ndarray, " n"]

    def floor_seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Returns the fewest seconds for all steps, one after the other."""
        return float(np.sum(np.maximum(self.flops / flops_per_s, self.num_bytes / bytes_per_s)))


def computed_before(steps: Steps) -> Int64[np.ndarray, "n S"]:
    """Returns how many positions of each slot's sequence had keys and values before each step.

    A sequence has none when it gets a slot.
    """
    before = np.zeros(steps.occupant.shape, np.int64)
    for now in range(1, len(steps)):
        is_same = (steps.occupant[now] == steps.occupant[now - 1]) & (steps.occupant[now] >= 0)
        before[now] = np.where(is_same, before[now - 1] + steps.num_new[now - 1], 0)
    return before


def work_of_steps(steps: Steps, model: ModelConfig, dtype: str, matrices_dtype: str | None = None) -> Work:
    """Returns the work of recorded steps.

    Args:
      steps: the recorded steps.
      model: hyperparameters.
      dtype: dtype of weights, keys and values.
      matrices_dtype: `EngineConfig.weight_dtype`, whose scales are not counted; None: matrices have the dtype of all weights.
    """
    before, new = computed_before(steps), steps.num_new.astype(np.int64)
    pairs, read = np.zeros((2, len(steps)), np.int64)  # summed over all layers
    for window in model.windows:
        pairs += np.sum(_visible(before + new, window) - _visible(before, window), axis=1)
        behind = before + new if window is None else np.minimum(before + new, window + new - 1)
        read += np.sum(np.where(new > 0, behind, 0), axis=1)
    kv_itemsize = np.dtype(weight_dtype(dtype)).itemsize
    return _work(
        model,
        dtype,
        matrices_dtype,
        rows=new.sum(axis=1),
        drawn=steps.sampled.sum(axis=1),
        pairs=pairs,
        read=read,
        kv_itemsize=kv_itemsize,
    )


def work_of_decode(model: ModelConfig, dtype: str, kv_dtype: str, *, slots: int, num_tokens: float) -> Work:
    """Returns the work of one step in which every slot decodes and each batch row sees `num_tokens` positions."""
    seen = np.array([sum(slots * min(num_tokens, window or np.inf) for window in model.windows)])
    rows = np.array([slots])
    kv_itemsize = np.dtype(kv_dtype).itemsize
    return _work(model, dtype, None, rows=rows, drawn=rows, pairs=seen, read=seen, kv_itemsize=kv_itemsize)


def prefill_flops(model: ModelConfig, dtype: str, num_tokens: int) -> int:
    """Returns the FLOPs of the prefill of one prompt, up to its first generated token."""
    rows, drawn = np.array([num_tokens]), np.array([1])
    pairs = sum(_visible(rows, window) for window in model.windows)
    return int(_work(model, dtype, None, rows=rows, drawn=drawn, pairs=pairs, read=0 * rows, kv_itemsize=0).flops[0])


def weight_bytes_per_token(model: ModelConfig, dtype: str, matrices_dtype: str | None = None) -> int:
    """Returns the bytes of the weights that each token needs: all but an embedding that is not the output projection too.

    Args:
      model: hyperparameters.
      dtype: dtype of the weights.
      matrices_dtype: as in `work_of_steps`.
    """
    total = 0
    for path, leaf in leaves_with_paths(abstract_params(model, dtype)):
        if path[-1] != "embedding" or model.tied_embeddings:
            narrow = matrices_dtype is not None and is_matrix(path, leaf)
            total += leaf.size * np.dtype(matrices_dtype if narrow else leaf.dtype).itemsize
    return total


def is_matrix(path: Path, leaf: Any) -> bool:
    """Returns whether activations are multiplied by this parameter; the bias of a gate has two axes too, but is added."""
    return leaf.ndim > 1 and not str(path[-1]).endswith("bias")


def _work(
    model: ModelConfig,
    dtype: str,
    matrices_dtype: str | None,
    *,
    rows: Any,
    drawn: Any,
    pairs: Any,
    read: Any,
    kv_itemsize: int,
) -> Work:
    """Returns the work of steps.

    Args:
      model, dtype, matrices_dtype: as in `work_of_steps`.
      rows: batch rows of each step.
      drawn: rows of each step that draw a token.
      pairs: pairs of a query and a visible key, summed over layers.
      read: positions whose keys and values are read, summed over layers.
      kv_itemsize: bytes of an element of keys and values.
    """
    blocks = leaves_with_paths(abstract_params(model, dtype)["blocks"])
    matrices = sum(leaf.size for path, leaf in blocks if is_matrix(path, leaf))
    vectors = sum(leaf.size for _, leaf in blocks) - matrices
    head = model.vocab_size * model.embed_dim
    itemsize = np.dtype(weight_dtype(dtype)).itemsize
    matrices_itemsize = np.dtype(matrices_dtype or weight_dtype(dtype)).itemsize
    flops = 2 * rows * matrices + 2 * drawn * head + 4 * model.num_heads * model.head_dim * pairs
    num_bytes = 2 * model.num_kv_heads * model.head_dim * (read + rows * model.num_layers) * kv_itemsize
    num_bytes = num_bytes + itemsize * vectors * (rows > 0)
    num_bytes = num_bytes + matrices_itemsize * (matrices * (rows > 0) + head * (drawn > 0))
    return Work(flops.astype(np.int64), num_bytes.astype(np.int64))


def _visible(num_positions: Any, window: int | None) -> Any:
    """Returns the pairs of query and key of the first positions: the sum of min(i, window) over i = 1 .. num_positions."""
    near = num_positions if window is None else np.minimum(num_positions, window)
    far = 0 if window is None else np.maximum(num_positions - window, 0) * window
    return near * (near + 1) // 2 + far
