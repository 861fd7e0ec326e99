"""Dense causal attention, for training, and as the oracle of the tests of attention over pages."""

from typing import Any

import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float32

from jaxserve.models.layers import Attend, Projection
from pallas_kernels.rotary_write.reference import rotated_heads


def causal_attend(batch: int, time: int) -> Attend:
    """Returns an `attend` for a flat batch that is `batch` whole sequences of `time` tokens, one after the other.

    It carries no keys and values: pass `kv=None`.
    """

    def attend(
        projection: Projection, kv: Any, *, layer: int, window: int | None
    ) -> tuple[Float32[Array, "B H D"], Any]:
        del layer
        q, k, v = rotated_heads(*projection)
        num_kv_heads, head_dim = k.shape[1:]
        q = q.reshape(batch, time, num_kv_heads, -1, head_dim)
        k = k.reshape(batch, time, num_kv_heads, head_dim)
        v = v.reshape(batch, time, num_kv_heads, head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        distance = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        weights = nn.softmax(jnp.where(visible[None, None, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return out.reshape(batch * time, -1, head_dim), kv

    return attend
