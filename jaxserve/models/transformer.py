"""The decoder-only transformer: embedding, blocks, final norm, output projection."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend, Block, RMSNorm, _kernel, is_prepared, matmul_transposed
from jaxserve.models.rope import rotations
from pallas_kernels import native


class Transformer(nnx.Module):
    """One forward for prefill, decode, scoring and training: it works on flat rows, a row being one token.

    Which rows belong to one sequence, and what they may attend to, is known to `attend` alone.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.embedding = _kernel(rngs, (config.vocab_size, config.embed_dim), dtype)
        self.blocks = nnx.List([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        tied = config.tied_embeddings
        self.lm_head = None if tied else _kernel(rngs, (config.vocab_size, config.embed_dim), dtype)

    def __call__(
        self,
        tokens: Int32[Array, " B"],
        positions: Int32[Array, " B"],
        *,
        attend: Attend,
        kv: Any,
    ) -> tuple[Float32[Array, "B E"], Any]:
        """Final hidden states of the rows, and what the layers made of `kv`.

        Args:
          tokens: token id per row, in [0, V).
          positions: position of each row in its sequence, counted from 0.
          attend: see `Attend`. With prepared parameters it must be `native.PagedBatch`: one kernel does all blocks.
          kv: one entry per layer, or None for an `attend` that carries nothing.
        """
        config = self.config
        rotation = rotations(config.rope, config.head_dim, positions)
        if isinstance(attend, native.PagedBatch) and is_prepared(self.blocks[0].attention.qkv[...]):
            x = native.embed(self.embedding[...], tokens, config.embed_dim, attend.batch_size)
            weights = [block.weights() for block in self.blocks]
            options: dict[str, Any] = {
                "group_size": config.group_size,
                "eps": config.norm_eps,
                "windows": config.windows,
            }
            x, layers = native.blocks(x, *rotation, weights, kv, attend, ffw_dim=config.ffw_dim, **options)
            return self.final_norm(x), tuple(layers)
        if any(is_prepared(block.attention.qkv[...]) for block in self.blocks):
            raise ValueError(
                "these parameters are prepared for native kernels: use them with native.PagedBatch as `attend`"
            )
        x = self.embedding[...][tokens].astype(jnp.float32)
        layers = [None] * config.num_layers if kv is None else list(kv)
        for layer, block in enumerate(self.blocks):
            x, layers[layer] = block(x, rotation, layers[layer], attend, layer=layer, window=config.windows[layer])
        return self.final_norm(x), tuple(layers)

    def logits(
        self, hidden: Float32[Array, "B E"], batch_size: Int32[Array, ""] | None = None
    ) -> Float32[Array, "B V"]:
        """Next-token logits of final hidden states; `batch_size` as in `native.product`."""
        weight = (self.embedding if self.lm_head is None else self.lm_head)[...]
        if is_prepared(weight):
            return native.product(hidden, weight, num_columns=self.config.vocab_size, batch_size=batch_size)
        return matmul_transposed(hidden, weight)


@functools.cache
def graphdef_of(config: ModelConfig) -> nnx.GraphDef:
    """The static half of `nnx.split(Transformer(config))`, made without allocating a weight."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
