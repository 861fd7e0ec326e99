"""Model definitions: one decoder-only transformer, configured per family, as `flax.nnx` modules."""

from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.dense import causal_attend
from jaxserve.models.layers import Attend, Projection
from jaxserve.models.transformer import Transformer, graphdef_of
from pallas_kernels.rotary_write.reference import rotated_heads

__all__ = [
    "Attend",
    "ModelConfig",
    "Projection",
    "RopeConfig",
    "Transformer",
    "causal_attend",
    "graphdef_of",
    "rotated_heads",
]
