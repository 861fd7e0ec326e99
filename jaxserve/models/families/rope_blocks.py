"""The rotary embedding settings of a Hugging Face config.json, read into a `RopeConfig` and written back.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes one object `rope_parameters`. Either form is read,
and both together where they agree.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import RopeConfig
from jaxserve.models.families.fields import FLAG, NAME, OBJECT, POSITIVE, SIZE, read

KINDS = ("default", "linear", "llama3", "yarn")
LENGTH_DEPENDENT_KINDS = ("dynamic", "longrope", "su")

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
}
# Some kinds do not use `original_max_position_embeddings`; a `partial_rotary_factor` of 1 rotates every dimension.
_COMMON_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}
_ORIGINAL = "original_max_position_embeddings"


def read_rope(mapping: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Returns the rotary embedding that a config.json describes.

    Args:
      mapping: the contents of config.json.
      max_position: its `max_position_embeddings`, which is the default of the length before stretching.

    Raises:
      ValueError: if the kind is not supported, a field is missing, unknown or of the wrong type, or two fields disagree.
    """
    scaling = read(mapping, "rope_scaling", OBJECT) or {}
    parameters = read(mapping, "rope_parameters", OBJECT) or {}
    sources = [_with_one_name_of_the_kind(source) for source in (parameters, scaling)]
    merged = {key: _agreed(key, *sources) for source in sources for key in source}
    for key in ("rope_theta", _ORIGINAL):
        merged[key] = _agreed(key, *sources, mapping)
    kind = read(merged, "rope_type", NAME) or "default"
    _check_kind(kind, merged)
    theta = read(merged, "rope_theta", POSITIVE) or 10000.0
    if kind == "default":
        return RopeConfig(theta=float(theta))
    original = read(merged, _ORIGINAL, SIZE) or max_position
    factor = read(merged, "factor", POSITIVE)
    if factor is None and kind == "yarn":
        factor = max_position / original
    plain = RopeConfig(theta=float(theta), kind=kind, factor=float(_required(kind, "factor", factor)))
    if kind == "linear":
        return plain
    plain = dataclasses.replace(plain, original_max_position=original)
    return _read_llama3(plain, merged) if kind == "llama3" else _read_yarn(plain, merged)


def _with_one_name_of_the_kind(source: Mapping[str, Any]) -> dict[str, Any]:
    source = dict(source)
    kind = _agreed("rope_type", source, {"rope_type": source.pop("type", None)})
    return source if kind is None else source | {"rope_type": kind}


def _agreed(key: str, *sources: Mapping[str, Any]) -> Any:
    values = [source[key] for source in sources if source.get(key) is not None]
    if any(value != values[0] for value in values):
        raise ValueError(f"{key} is given more than once, as {' and '.join(map(repr, values))}: keep one of them")
    return values[0] if values else None


def _check_kind(kind: str, merged: Mapping[str, Any]) -> None:
    if any(isinstance(value, Mapping) for value in merged.values()):
        raise ValueError("rope_parameters per layer type are not supported: use one rotary embedding for all layers")
    if kind in LENGTH_DEPENDENT_KINDS:
        raise ValueError(
            f"rope type {kind!r} is not supported, because its frequencies change with the length of the sequence, so "
            f"that keys already cached would go stale: use {', '.join(KINDS)}"
        )
    if kind not in KINDS:
        raise ValueError(f"rope type {kind!r} is not supported: use {', '.join(KINDS)}")
    unknown = sorted(merged.keys() - _COMMON_KEYS - _KEYS[kind])
    if unknown:
        raise ValueError(f"rope type {kind!r} has no parameter {unknown[0]!r}: remove it or correct its name")
    if merged.get("partial_rotary_factor") not in (None, 1):
        value = merged["partial_rotary_factor"]
        raise ValueError(
            f"partial_rotary_factor={value!r} is not supported: all dimensions of a head are rotated (1.0)"
        )


def _required(kind: str, key: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"rope type {kind!r} needs {key}: add it to rope_parameters or rope_scaling")
    return value


def _read_llama3(plain: RopeConfig, merged: Mapping[str, Any]) -> RopeConfig:
    low = _required("llama3", "low_freq_factor", read(merged, "low_freq_factor", POSITIVE))
    high = _required("llama3", "high_freq_factor", read(merged, "high_freq_factor", POSITIVE))
    if low >= high:
        raise ValueError(f"low_freq_factor={low} must be below high_freq_factor={high}")
    return dataclasses.replace(plain, low_freq_factor=float(low), high_freq_factor=float(high))


def _read_yarn(plain: RopeConfig, merged: Mapping[str, Any]) -> RopeConfig:
    def number(key: str, default: float) -> float:
        return float(read(merged, key, POSITIVE) or default)

    attention_factor = read(merged, "attention_factor", POSITIVE)
    return dataclasses.replace(
        plain,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        mscale=number("mscale", 0.0),
        mscale_all_dim=number("mscale_all_dim", 0.0),
        truncate=bool(read(merged, "truncate", FLAG, default=True)),
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Returns both forms of the settings for a config.json."""
    settings: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        settings["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        settings[_ORIGINAL] = rope.original_max_position
    if rope.kind == "llama3":
        settings |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        settings |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {"attention_factor": rope.attention_factor, "mscale": rope.mscale}
        optional["mscale_all_dim"] = rope.mscale_all_dim
        settings |= {key: value for key, value in optional.items() if value}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else settings,
        "rope_parameters": {"rope_theta": rope.theta, **settings},
    }
