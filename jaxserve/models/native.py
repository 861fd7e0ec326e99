"""The transformer on native kernels: parameters packed for them, and a forward that computes all blocks in one call.

`jaxserve.models.prepare` packs parameters. The layers of `jaxserve.models.layers` stay plain JAX and do not depend on this.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Num

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend, rms_norm
from jaxserve.models.rope import rotations
from pallas_kernels import native


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("embedding", "blocks", "final_norm", "lm_head"),
    meta_fields=("loaded_dtype", "weight_dtype"),
)
@dataclasses.dataclass(frozen=True)
class PackedParams:
    """All parameters of a model, as native kernels read them. A pytree; the two dtypes are part of its structure."""

    embedding: Num[Array, "..."]  # the table [V, E] as it was loaded; if it is the output projection too, packed
    blocks: tuple[native.BlockWeights, ...]  # per layer; matrices packed, biases and scales in float32
    final_norm: Float32[Array, " E"]
    lm_head: Num[Array, "V/64 E/2 _ _"] | None  # packed; None: the embedding is the output projection
    loaded_dtype: np.dtype  # dtype of the weights before they were packed
    weight_dtype: str | None  # as in `EngineConfig`: "int8", or None where the weights kept their dtype


@dataclasses.dataclass(frozen=True)
class PackedTransformer:
    """The forward of `jaxserve.models.Transformer` with packed parameters, made by `jaxserve.models.bind.bind`."""

    params: PackedParams
    config: ModelConfig

    def __call__(
        self, tokens: Int32[Array, " B"], positions: Int32[Array, " B"], *, attend: Attend, kv: Any
    ) -> tuple[Float32[Array, "B E"], Any]:
        """Returns the final hidden states of the tokens, and the pages with their keys and values.

        Args:
          tokens: token ids, each in [0, V).
          positions: position of each token in its sequence, counted from 0.
          attend: a `native.PagedBatch`. Results beyond its `batch_size` are undefined.
          kv: the pair of page arrays of each layer.

        Raises:
          ValueError: if `attend` is anything else.
        """
        if not isinstance(attend, native.PagedBatch):
            raise ValueError(
                "these parameters are prepared for native kernels: use them with native.PagedBatch as `attend`, or give "
                "parameters that are not prepared"
            )
        params, config = self.params, self.config
        rotation = rotations(config.rope, config.head_dim, positions)
        x = native.embed(params.embedding, tokens, config.embed_dim, attend.batch_size)
        sizes: dict[str, Any] = {
            "ffw_dim": config.ffw_dim,
            "group_size": config.group_size,
            "eps": config.norm_eps,
            "windows": config.windows,
        }
        x, pages = native.blocks(x, *rotation, params.blocks, kv, attend, **sizes)
        return rms_norm(x, params.final_norm, config.norm_eps), tuple(pages)

    def logits(self, hidden: Float[Array, "B E"], batch_size: Int32[Array, ""] | None = None) -> Float32[Array, "B V"]:
        """Returns the next-token logits of final hidden states.

        Args:
          hidden: final hidden states.
          batch_size: how many of them count, from the first on; the logits of others are undefined. None: all.
        """
        weight = self.params.embedding if self.params.lm_head is None else self.params.lm_head
        return native.product(hidden, weight, num_columns=self.config.vocab_size, batch_size=batch_size)
