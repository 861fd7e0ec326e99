"""A model as a function of tokens: parameters of either kind, bound to the forward that takes them."""

from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend
from jaxserve.models.native import PackedTransformer
from jaxserve.models.prepare import PackedParams, Params
from jaxserve.models.transformer import graphdef_of


class BoundModel(Protocol):
    """The interface that `Transformer` and `PackedTransformer` share."""

    def __call__(
        self, tokens: Int32[Array, " B"], positions: Int32[Array, " B"], *, attend: Attend, kv: Any
    ) -> tuple[Float32[Array, "B E"], Any]:
        """Returns the final hidden states of the tokens, and `kv` with their keys and values."""
        ...

    def logits(
        self, hidden: Float32[Array, "B E"], batch_size: Int32[Array, ""] | None = None
    ) -> Float32[Array, "B V"]:
        """Returns the next-token logits of the first `batch_size` hidden states; None: of all."""
        ...


def bind(params: Params, model: ModelConfig) -> BoundModel:
    """Returns the model with these parameters: a `PackedTransformer` if they are packed, else a `Transformer`.

    Args:
      params: `nnx.split(Transformer(model))[1]`, or what `prepare` made of it.
      model: the model of the parameters.
    """
    if isinstance(params, PackedParams):
        return PackedTransformer(params, model)
    return nnx.merge(graphdef_of(model), params)
