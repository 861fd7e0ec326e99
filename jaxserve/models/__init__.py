"""Model definitions: one decoder-only transformer, configured per family, as `flax.nnx` modules."""

from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.dense import causal_attend
from jaxserve.models.layers import Attend
from jaxserve.models.transformer import Transformer, graphdef_of

__all__ = ["Attend", "ModelConfig", "RopeConfig", "Transformer", "causal_attend", "graphdef_of"]
