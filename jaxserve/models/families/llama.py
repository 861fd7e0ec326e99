"""Llama and the families with its layout: Mistral, Qwen2, Qwen3."""

from jaxserve.models.families.family import Family
from jaxserve.models.families.windows import ALL_LAYERS, NO_LAYER, SOME_LAYERS

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        attention_bias="field",
        mlp_bias=True,
        windows=NO_LAYER,
        qk_norm=False,
        num_kv_heads=None,
        head_dim=None,
        max_position=2048,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        attention_bias="never",
        mlp_bias=False,
        windows=ALL_LAYERS,
        qk_norm=False,
        num_kv_heads=8,
        head_dim=None,
        max_position=131072,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        attention_bias="qkv",
        mlp_bias=False,
        windows=SOME_LAYERS,
        qk_norm=False,
        num_kv_heads=32,
        head_dim=None,
        max_position=32768,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention_bias="field",
        mlp_bias=False,
        windows=SOME_LAYERS,
        qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
        max_position=32768,
    ),
}
