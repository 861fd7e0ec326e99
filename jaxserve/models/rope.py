"""Rotary position embedding: frequencies, their stretching to longer contexts, and the angles of positions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxserve.models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns angular frequencies in radians per position, float32[D/2], and the factor on cos and sin.

    Raises:
      ValueError: if `rope.kind` is not one of the four kinds of `RopeConfig`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    raise ValueError(f"rope kind {rope.kind!r} is not supported: use default, linear, llama3 or yarn")


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_position / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * plain / rope.factor + blend * plain).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    def dimension_of(turns: float) -> float:
        wavelengths = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    mixed = plain / rope.factor * ramp + plain * (1 - ramp)
    return mixed.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rotations(
    rope: RopeConfig, head_dim: int, positions: Int32[Array, " B"]
) -> tuple[Float32[Array, "B D/2"], Float32[Array, "B D/2"]]:
    """Returns cos and sin of the angles of every position, times the factor of `frequencies`."""
    freqs, scale = frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(freqs)[None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
