"""What each step of a run had to compute and to move at least, and how soon a machine of given peaks could be done.

    a step's floor = max(FLOPs / matmul rate, bytes / bandwidth)

FLOPs: the blocks' matrices for every row, the output projection for every row that draws a token, and attention over what each
row may see. Bytes: the weights once, the keys and values that each sequence's rows see once, those of the new rows. Norms,
softmax, sampling and the host are free. Steps are taken as they were, with the rows that the scheduler gave them.
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
    """Of each step of a run."""

    flops: Int64[np.ndarray, " n"]
    num_bytes: Int64[np.ndarray, " n"]

    def floor_seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Fewest seconds for all steps, one after the other."""
        return float(np.sum(np.maximum(self.flops / flops_per_s, self.num_bytes / bytes_per_s)))


def computed_before(steps: Steps) -> Int64[np.ndarray, "n S"]:
    """Positions of each slot's sequence that had keys and values before each step; it starts anew whenever it gets a slot."""
    before = np.zeros(steps.occupant.shape, np.int64)
    for now in range(1, len(steps)):
        stayed = (steps.occupant[now] == steps.occupant[now - 1]) & (steps.occupant[now] >= 0)
        before[now] = np.where(stayed, before[now - 1] + steps.num_new[now - 1], 0)
    return before


def work_of(steps: Steps, model: ModelConfig, dtype: str, matrices_dtype: str | None = None) -> Work:
    """What the steps had to do.

    Args:
      dtype: of weights, keys and values.
      matrices_dtype: as `EngineConfig.weight_dtype`, the scales of which are not counted; None: as the other weights.
    """
    before, new = computed_before(steps), steps.num_new.astype(np.int64)
    seen, read = np.zeros(
        (2, len(steps)), np.int64
    )  # pairs of query and key; positions whose keys are read; over all layers
    for window in model.windows:
        seen += np.sum(_pairs(before + new, window) - _pairs(before, window), axis=1)
        behind = before + new if window is None else np.minimum(before + new, window + new - 1)
        read += np.sum(np.where(new > 0, behind, 0), axis=1)
    rows, drawn = new.sum(axis=1), steps.sampled.sum(axis=1)
    itemsize = np.dtype(weight_dtype(dtype)).itemsize
    matrices, block_elements, head_elements = _elements(model, dtype)
    flops = 2 * rows * matrices + 2 * drawn * head_elements + 4 * model.num_heads * model.head_dim * seen
    keys = 2 * model.num_kv_heads * model.head_dim * (read + rows * model.num_layers)
    vectors = (block_elements - matrices) * (rows > 0)
    num_bytes = itemsize * (vectors + keys)
    num_bytes += np.dtype(matrices_dtype or weight_dtype(dtype)).itemsize * (
        matrices * (rows > 0) + head_elements * (drawn > 0)
    )
    return Work(flops, num_bytes)


def _pairs(positions: Any, window: int | None) -> Any:
    """Pairs of query and key of the first positions: sum of min(i, window) over i = 1 .. positions."""
    near = positions if window is None else np.minimum(positions, window)
    far = 0 if window is None else np.maximum(positions - window, 0) * window
    return near * (near + 1) // 2 + far


def _elements(model: ModelConfig, dtype: str) -> tuple[int, int, int]:
    """Elements of the blocks' matrices, of all that a step reads of the blocks, of the output projection."""
    blocks = leaves_with_paths(abstract_params(model, dtype)["blocks"])
    matrices = sum(leaf.size for path, leaf in blocks if is_matrix(path, leaf))
    return matrices, sum(leaf.size for _, leaf in blocks), model.vocab_size * model.embed_dim


def is_matrix(path: Path, leaf: Any) -> bool:
    """Whether a parameter is multiplied by; the bias of a gate has two axes too."""
    return leaf.ndim > 1 and not str(path[-1]).endswith("bias")
