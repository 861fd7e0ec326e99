"""The demo model: its shape, attention and loss that train fast on a CPU, and its export to Hugging Face layout."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import tokenizers
from demo import tokenizer as demo_tokenizer
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxserve.models import Attend, ModelConfig, RopeConfig, Transformer, graphdef_of, rotated_heads
from jaxserve.models.checkpoint.hugging_face import load_hugging_face, save_hugging_face

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
    """Returns an `attend` like that of `causal_attend`, in which a block of queries reads only the keys up to its own end."""
    block = min(block, time)
    triangle = jnp.where(jnp.arange(block)[:, None] >= jnp.arange(block)[None, :], 0.0, -1e9)

    def attend(projection, kv, *, layer, window):
        del layer, window  # the demo model has no window
        q, k, v = rotated_heads(*projection)
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
    """Returns the mean negative log likelihood in nats.

    The forward pass computes the gradient too, so that logits exist for `chunk` rows at a time only.
    """
    return _cross_entropy_forward(hidden, embedding, targets, chunk)[0]


def _cross_entropy_forward(hidden, embedding, targets, chunk):
    num_rows = hidden.shape[0]
    loss, grad_hidden, grad_embedding = jnp.zeros(()), [], jnp.zeros_like(embedding)
    for start in range(0, num_rows, chunk):
        rows, labels = hidden[start : start + chunk], targets[start : start + chunk]
        logits = rows @ embedding.T
        peak = logits.max(axis=1, keepdims=True)
        exp = jnp.exp(logits - peak)
        total = exp.sum(axis=1, keepdims=True)
        hit = jnp.arange(embedding.shape[0])[None, :] == labels[:, None]
        loss += jnp.sum(jnp.log(total)[:, 0] + peak[:, 0] - jnp.where(hit, logits, 0.0).sum(axis=1))
        grad_logits = (exp / total - hit.astype(exp.dtype)) / num_rows
        grad_hidden.append(grad_logits @ embedding)
        grad_embedding += lax.dot_general(grad_logits, rows, (((0,), (0,)), ((), ())))
    return loss / num_rows, (jnp.concatenate(grad_hidden), grad_embedding)


def _cross_entropy_backward(chunk, residuals, grad):
    del chunk
    return grad * residuals[0], grad * residuals[1], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def hidden_states(model: Transformer, tokens: Int32[Array, "N T"]) -> Float32[Array, "N*T E"]:
    """Returns the final hidden states of N whole sequences of T tokens, one row per token."""
    batch, time = tokens.shape
    positions = jnp.tile(jnp.arange(time, dtype=jnp.int32), batch)
    attend = causal_attend_in_blocks(batch, time)
    return model(tokens.reshape(-1), positions, attend=attend, kv=None)[0]


def export(params: nnx.State, tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """Writes bfloat16 weights, configuration and tokenizer as `transformers` reads them (Qwen3ForCausalLM)."""
    end = demo_tokenizer.END_OF_TEXT_ID
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    save_hugging_face(params, CONFIG, directory, jnp.bfloat16, extra_config=special)
    (directory / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    demo_tokenizer.save(tokenizer, directory, context=CONFIG.max_position)


def load(directory: pathlib.Path) -> Transformer:
    """Loads an exported model and widens its bfloat16 weights to float32."""
    return nnx.merge(graphdef_of(CONFIG), load_hugging_face(directory, CONFIG, dtype=jnp.float32))
