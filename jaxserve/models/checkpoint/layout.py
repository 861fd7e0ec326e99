"""How the tensors of a Hugging Face checkpoint become the leaves of our parameters, and back.

Hugging Face kernels are [out, in], ours are [in, out], and some of ours are made of several of theirs:

    qkv      [E, K (G + 2) D]   for each kv head: its G query heads, its key, its value
    gate_up  [E, 2, F]          gate, up
    out      [H D, E]           o_proj, transposed; `down` is down_proj, transposed
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.params import Path


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How one leaf is made of tensors: each is cut into `groups` along its rows, the groups are interleaved, then transposed.

    With groups = 2 and rows (4, 2, 2), q0 q1 q2 q3, k0 k1 and v0 v1 become q0 q1 k0 v0 q2 q3 k1 v1.

    Attributes:
      names: names of the tensors.
      rows: size of the first axis of each.
      columns: size of their second axis; None: they are vectors.
      groups: number of pieces that each is cut into.
      transposed: whether the rows of the tensors are the last axis of the leaf.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None = None
    groups: int = 1
    transposed: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        tail = () if self.columns is None else (self.columns,)
        return {name: (rows, *tail) for name, rows in zip(self.names, self.rows, strict=True)}

    def fuse(self, tensors: Sequence[np.ndarray], leaf_shape: tuple[int, ...]) -> np.ndarray:
        """Returns the leaf, as a transposed view: `jax.device_put` transposes four times as fast as numpy."""
        tail = tensors[0].shape[1:]
        pieces = [tensor.reshape(self.groups, -1, *tail) for tensor in tensors]
        fused = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
        fused = fused.reshape(-1, *tail)
        return (fused.T if self.transposed else fused).reshape(leaf_shape)

    def split(self, leaf: np.ndarray) -> list[np.ndarray]:
        """Returns the tensors of which `fuse` makes the leaf."""
        if self.columns is None:
            fused: np.ndarray = leaf.reshape(-1)
        else:
            fused = leaf.reshape(self.columns, -1).T if self.transposed else leaf
        fused = fused.reshape(self.groups, -1, *fused.shape[1:])
        ends = np.cumsum(self.rows) // self.groups
        pieces = np.split(fused, ends[:-1], axis=1)
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes.values(), strict=True)]


def fusion_of(path: Path, config: ModelConfig) -> Fusion:
    """Returns the tensors of a checkpoint that make up the leaf at `path`.

    Raises:
      ValueError: if no tensors do.
    """
    embed = config.embed_dim
    if path[0] == "blocks":
        return _fusion_in_block(f"model.layers.{path[1]}", path[2:], config)
    if path == ("final_norm", "scale"):
        return Fusion(("model.norm.weight",), (embed,))
    name = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[str(path[0])]
    return Fusion((name,), (config.vocab_size,), embed, transposed=False)


def _fusion_in_block(block: str, path: Path, config: ModelConfig) -> Fusion:
    embed, ffw = config.embed_dim, config.ffw_dim
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    gate_up = tuple(f"{block}.mlp.{name}_proj" for name in ("gate", "up"))
    out, down = f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj"
    widths = (q_width, kv_width, kv_width)
    match path:
        case ("attention_norm", "scale"):
            return Fusion((f"{block}.input_layernorm.weight",), (embed,))
        case ("ffw_norm", "scale"):
            return Fusion((f"{block}.post_attention_layernorm.weight",), (embed,))
        case ("attention", "q_norm" | "k_norm" as norm, "scale"):
            return Fusion((f"{block}.self_attn.{norm}.weight",), (config.head_dim,))
        case ("attention", "qkv"):
            return Fusion(_suffixed(qkv, "weight"), widths, embed, groups=config.num_kv_heads)
        case ("attention", "qkv_bias"):
            return Fusion(_suffixed(qkv, "bias"), widths, groups=config.num_kv_heads)
        case ("attention", "out"):
            return Fusion((f"{out}.weight",), (embed,), q_width)
        case ("attention", "out_bias"):
            return Fusion((f"{out}.bias",), (embed,))
        case ("ffw", "gate_up"):
            return Fusion(_suffixed(gate_up, "weight"), (ffw, ffw), embed)
        case ("ffw", "gate_up_bias"):
            return Fusion(_suffixed(gate_up, "bias"), (ffw, ffw))
        case ("ffw", "down"):
            return Fusion((f"{down}.weight",), (embed,), ffw)
        case ("ffw", "down_bias"):
            return Fusion((f"{down}.bias",), (embed,))
    raise ValueError(f"parameter {'.'.join(map(str, path))} has no counterpart in a Hugging Face checkpoint")


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}.{suffix}" for name in names)
