"""The demo model: its shape, a fast training attention and loss for CPU, and its export to Hugging Face layout."""

import functools
import json
import pathlib

import demo_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.models import Attend, ModelConfig, RopeConfig, Transformer

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=demo_tokenizer.VOCAB_SIZE,
    embed_dim=256,
    ffw_dim=640,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope=RopeConfig(theta=10000.0),
    tied_embeddings=True,
    qk_norm=True,
    max_position=512,
)


def causal_attend_in_blocks(batch: int, time: int, block: int = 128) -> Attend:
    """`jaxserve.models.causal_attend`, but a block of queries reads only the keys up to its own end."""
    block = min(block, time)
    triangle = jnp.where(jnp.arange(block)[:, None] >= jnp.arange(block)[None, :], 0.0, -1e9)

    def attend(q, k, v, kv, *, layer, window):
        del layer, window  # The demo model has no window.
        num_kv_heads, head_dim = k.shape[1:]
        q = q.reshape(batch, time, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch * num_kv_heads, -1, time, head_dim)
        k = k.reshape(batch, time, num_kv_heads, head_dim).transpose(0, 2, 1, 3).reshape(-1, time, head_dim)
        v = v.reshape(batch, time, num_kv_heads, head_dim).transpose(0, 2, 1, 3).reshape(-1, time, head_dim)
        outs = []
        for start in range(0, time, block):
            end = start + block
            queries = q[:, :, start:end].reshape(q.shape[0], -1, head_dim)
            scores = jnp.einsum("bqd,bsd->bqs", queries, k[:, :end]).reshape(q.shape[0], -1, block, end)
            scores = scores + jnp.concatenate([jnp.zeros((block, start)), triangle], axis=1)[None, None]
            weights = jax.nn.softmax(scores, axis=-1).reshape(q.shape[0], -1, end)
            outs.append(jnp.einsum("bqs,bsd->bqd", weights, v[:, :end]).reshape(*q.shape[:2], block, head_dim))
        out = jnp.concatenate(outs, axis=2).reshape(batch, num_kv_heads, -1, time, head_dim)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch * time, -1, head_dim), kv

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: Float32[Array, "B E"], embedding: Float32[Array, "V E"], targets: Int32[Array, " B"], chunk: int = 512
) -> Float32[Array, ""]:
    """Mean negative log likelihood in nats; the gradient is made on the way, so logits live for `chunk` rows only."""
    return _cross_entropy_forward(hidden, embedding, targets, chunk)[0]


def _cross_entropy_forward(hidden, embedding, targets, chunk):
    num_rows = hidden.shape[0]
    loss, grad_hidden, grad_embedding = jnp.zeros(()), [], jnp.zeros_like(embedding)
    for start in range(0, num_rows, chunk):
        rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
        logits = rows @ embedding.T
        peak = logits.max(axis=1, keepdims=True)
        exp = jnp.exp(logits - peak)
        total = exp.sum(axis=1, keepdims=True)
        hit = jnp.arange(embedding.shape[0])[None, :] == wanted[:, None]
        loss += jnp.sum(jnp.log(total)[:, 0] + peak[:, 0] - jnp.where(hit, logits, 0.0).sum(axis=1))
        grad_logits = (exp / total - hit) / num_rows
        grad_hidden.append(grad_logits @ embedding)
        grad_embedding += lax.dot_general(grad_logits, rows, (((0,), (0,)), ((), ())))
    return loss / num_rows, (jnp.concatenate(grad_hidden), grad_embedding)


def _cross_entropy_backward(chunk, residuals, grad):
    del chunk
    return grad * residuals[0], grad * residuals[1], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def hidden_states(model: Transformer, tokens: Int32[Array, "N T"]) -> Float32[Array, "N*T E"]:
    """Final hidden states of N whole sequences of T tokens, as flat rows."""
    batch, time = tokens.shape
    positions = jnp.tile(jnp.arange(time, dtype=jnp.int32), batch)
    attend = causal_attend_in_blocks(batch, time)
    return model(tokens.reshape(-1), positions, attend=attend, kv=None)[0]


def export(model: Transformer, tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """Writes bfloat16 weights, configuration and tokenizer as `transformers` reads them (Qwen3ForCausalLM)."""
    config = model.config
    demo_tokenizer.save(tokenizer, directory, context=config.max_position)
    weights = {name: np.asarray(w.astype(jnp.bfloat16)) for name, w in hugging_face_weights(model).items()}
    safetensors.numpy.save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "bos_token_id": demo_tokenizer.END_OF_TEXT_ID,
        "eos_token_id": demo_tokenizer.END_OF_TEXT_ID,
        "pad_token_id": demo_tokenizer.END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }
    generation = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def hugging_face_weights(model: Transformer) -> dict[str, jax.Array]:
    """The model's weights under their names and in the layout of transformers' Qwen3: output features first."""
    config = model.config
    weights = {"model.embed_tokens.weight": model.embedding[...], "model.norm.weight": model.final_norm.scale[...]}
    for layer, block in enumerate(model.blocks):
        prefix, attention, ffw = f"model.layers.{layer}.", block.attention, block.ffw
        qkv = attention.qkv[...].reshape(config.embed_dim, config.num_kv_heads, config.group_size + 2, config.head_dim)
        weights |= {
            prefix + "self_attn.q_proj.weight": qkv[:, :, : config.group_size].reshape(config.embed_dim, -1).T,
            prefix + "self_attn.k_proj.weight": qkv[:, :, config.group_size].reshape(config.embed_dim, -1).T,
            prefix + "self_attn.v_proj.weight": qkv[:, :, config.group_size + 1].reshape(config.embed_dim, -1).T,
            prefix + "self_attn.o_proj.weight": attention.out[...].T,
            prefix + "self_attn.q_norm.weight": attention.q_norm.scale[...],
            prefix + "self_attn.k_norm.weight": attention.k_norm.scale[...],
            prefix + "mlp.gate_proj.weight": ffw.gate_up[...][:, 0].T,
            prefix + "mlp.up_proj.weight": ffw.gate_up[...][:, 1].T,
            prefix + "mlp.down_proj.weight": ffw.down[...].T,
            prefix + "input_layernorm.weight": block.attention_norm.scale[...],
            prefix + "post_attention_layernorm.weight": block.ffw_norm.scale[...],
        }
    return weights
