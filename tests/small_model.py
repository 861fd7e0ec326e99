"""A tiny checkpoint with a tokenizer, made on the spot, for tests of the engine and the command line."""

import json
import pathlib
from typing import Any

import jax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxserve import ModelConfig, Transformer
from jaxserve.models.checkpoint.hugging_face import save_hugging_face

MODEL = ModelConfig(
    family="llama",
    vocab_size=300,
    embed_dim=32,
    ffw_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tied_embeddings=True,
    max_position=128,
)
CAPACITIES: dict[str, Any] = {
    "max_slots": 4,
    "num_pages": 20,
    "page_size": 8,
    "max_model_len": 96,
    "chunk_size": 12,
    "max_queue": 6,
    "tile_rows": 8,
    "max_logprobs": 3,
    "max_steps_per_call": 8,
}
TINY_CONFIG: dict[str, Any] = {  # of a config.json, for random weights
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
EOS = 0
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"


def make_params(seed: int = 0) -> nnx.State:
    """Random weights, large enough that generated text varies."""
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(seed)))[1]
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)


def write_checkpoint(directory: pathlib.Path) -> pathlib.Path:
    """Weights, configuration, byte-level tokenizer, chat template."""
    save_hugging_face(make_params(), MODEL, directory, "float32", extra_config={"eos_token_id": EOS})
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog did not. " * 3], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
