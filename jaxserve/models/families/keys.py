"""The keys of a config.json: those that are read, those that are ignored, and those that must have their neutral value."""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.fields import NAMES, read, short

_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings",
}  # fmt: skip
# Settings of training, generation and storage, which do not describe the model.
_IRRELEVANT = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "initializer_range", "use_cache",
    "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Fields that would change the computation, with the values (besides null) at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (),
    "compression_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "use_qk_norm": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}


def refuse_what_is_not_supported(mapping: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError if another architecture is named, or a field asks for a computation that does not exist here."""
    architectures = read(mapping, "architectures", NAMES) or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(
            f"architectures={short(architectures)} is not supported for model_type "
            f"{mapping['model_type']!r}: use a checkpoint of {family.architecture}"
        )
    for key, neutral in _NEUTRAL.items():
        value = mapping.get(key)
        if value is not None and value not in neutral:
            way_out = f"only {neutral[0]!r} is" if neutral else "use a checkpoint without it"
            raise ValueError(f"{key}={short(value)} is not supported: {way_out}")


def refuse_unknown_keys(mapping: Mapping[str, Any]) -> None:
    """Raises ValueError if a key has no meaning here."""
    names = _READ | _IRRELEVANT | _NEUTRAL.keys()
    for key in sorted(mapping.keys() - names):
        close = difflib.get_close_matches(key, names, n=1)
        way_out = f"did you mean {close[0]!r}" if close else "remove it"
        raise ValueError(f"unknown key {key!r}: {way_out}")
