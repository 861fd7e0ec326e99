"""Tiny random models of every family, made and saved by transformers: the reference for parity.

The cases cover the features pairwise, not as a product. Weights are large enough for attention to be far from uniform,
and norms and biases are random too, so that a wrong operand shows.
"""

import dataclasses
import pathlib
from typing import Any

import torch
import transformers

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: its family, its heads and what else differs from `_SIZES`."""

    name: str
    family: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    changes: dict[str, Any]


def _rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


_LINEAR = _rope("linear", factor=3.0)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_YARN_MSCALE = _rope(
    "yarn",
    theta=5000.0,
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=8.0,
    beta_slow=0.5,
    mscale=1.0,
    mscale_all_dim=0.5,
    truncate=False,
)
_YARN_FACTOR = _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3)
_BIASED = {"attention_bias": True}
_TIED = {"tie_word_embeddings": True}
_MIXED = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LAST = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

CASES = (
    Case("llama", "llama", 4, 4, 12, {}),
    Case("llama-tied-group2-llama3", "llama", 4, 2, 16, _TIED | _LLAMA3),
    Case(
        "llama-biases-group4-dim20-linear",
        "llama",
        4,
        1,
        20,
        {"attention_bias": True, "mlp_bias": True} | _LINEAR,
    ),
    Case("llama-biases-tied-group7-dim6-yarn", "llama", 7, 1, 6, _BIASED | {"hidden_size": 56} | _TIED | _YARN),
    Case("llama-mlp-bias-group2-eps", "llama", 6, 3, 8, {"mlp_bias": True, "rms_norm_eps": 0.05}),
    Case("mistral-window-group4-dim20", "mistral", 8, 2, 20, {"sliding_window": 7}),
    Case("mistral-full-tied-group7-linear", "mistral", 14, 2, 6, {"sliding_window": None} | _TIED | _LINEAR),
    Case("mistral-window-group1-yarn-mscale", "mistral", 3, 3, 16, {"sliding_window": 9} | _YARN_MSCALE),
    Case("qwen2-tied-group7-dim6", "qwen2", 7, 1, 6, {"rms_norm_eps": 1e-5} | _TIED),
    Case("qwen2-mixed-group2-yarn", "qwen2", 4, 2, 12, _MIXED | _YARN_FACTOR),
    Case("qwen2-window-from-layer-1-group4-llama3", "qwen2", 4, 1, 20, _LAST | _LLAMA3),
    Case("qwen3-group1-dim20-linear", "qwen3", 3, 3, 20, {"rms_norm_eps": 0.01} | _LINEAR),
    Case("qwen3-biases-tied-group4-llama3", "qwen3", 8, 2, 6, _BIASED | _TIED | _LLAMA3),
    Case("qwen3-mixed-group7-theta", "qwen3", 7, 1, 16, _MIXED | _rope("default", 1e6)),
    Case("qwen3-mixed-biases-group2-yarn", "qwen3", 4, 2, 12, _BIASED | _MIXED | _YARN),
)


def build(case: Case, directory: pathlib.Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The case's model in evaluation mode, saved in `directory` as transformers saves it."""
    heads = {
        "num_attention_heads": case.num_heads,
        "num_key_value_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
    }
    settings = _SIZES | heads | case.changes | {"attn_implementation": "eager"}
    config = transformers.AutoConfig.for_model(case.family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomise(model)
    model.to(dtype).save_pretrained(directory)
    return model


def _randomise(model: transformers.PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
