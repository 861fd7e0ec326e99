"""The decoder-only transformer: embedding, blocks, final norm, output projection."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend, Block, RMSNorm, matmul_transposed, random_kernel
from jaxserve.models.rope import rotations


class Transformer(nnx.Module):
    """One forward for prefill, decode, scoring and training, in plain JAX.

    It works on a flat batch of tokens. Only `attend` knows which of them belong to one sequence, and what each may attend to.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.embedding = random_kernel(rngs, (config.vocab_size, config.embed_dim), dtype)
        self.blocks = nnx.List([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        tied = config.tied_embeddings
        self.lm_head = None if tied else random_kernel(rngs, (config.vocab_size, config.embed_dim), dtype)

    def __call__(
        self,
        tokens: Int32[Array, " B"],
        positions: Int32[Array, " B"],
        *,
        attend: Attend,
        kv: Any,
    ) -> tuple[Float32[Array, "B E"], Any]:
        """Returns the final hidden states of the tokens, and `kv` with their keys and values.

        Args:
          tokens: token ids, each in [0, V).
          positions: position of each token in its sequence, counted from 0.
          attend: see `Attend`.
          kv: one entry per layer, or None for an `attend` that carries nothing.
        """
        config = self.config
        rotation = rotations(config.rope, config.head_dim, positions)
        x = self.embedding[...][tokens].astype(jnp.float32)
        layers = [None] * config.num_layers if kv is None else list(kv)
        for layer, block in enumerate(self.blocks):
            x, layers[layer] = block(x, rotation, layers[layer], attend, layer=layer, window=config.windows[layer])
        return self.final_norm(x), tuple(layers)

    def logits(
        self, hidden: Float32[Array, "B E"], batch_size: Int32[Array, ""] | None = None
    ) -> Float32[Array, "B V"]:
        """Returns the next-token logits of final hidden states.

        Args:
          hidden: final hidden states.
          batch_size: how many of them count, from the first on. Plain JAX computes all; native kernels save work by it.
        """
        del batch_size
        return matmul_transposed(hidden, (self.embedding if self.lm_head is None else self.lm_head)[...])


@functools.cache
def graphdef_of(config: ModelConfig) -> nnx.GraphDef:
    """Returns the static half of `nnx.split(Transformer(config))`, made without allocating a weight."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
