"""Sliding windows in a config.json: how families say which layers have one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.families.fields import COUNT, FLAG, NAMES, SIZE, read, short


@dataclasses.dataclass(frozen=True)
class WindowRule:
    """How a family reads and writes the fields of its sliding windows.

    Attributes:
      read: takes the contents of a config.json and the number of layers, and returns the window of each layer, as in
        `ModelConfig`. Raises ValueError where fields contradict each other or the family.
      write: takes a model and returns the fields.
    """

    read: Callable[[Mapping[str, Any], int], tuple[int | None, ...]]
    write: Callable[[ModelConfig], dict[str, Any]]


def _read(mapping: Mapping[str, Any], num_layers: int, *, layers: str) -> tuple[int | None, ...]:
    name = mapping["model_type"]
    window = read(mapping, "sliding_window", SIZE, default=None if layers == "none" else 4096)
    enabled = read(mapping, "use_sliding_window", FLAG)
    first = read(mapping, "max_window_layers", COUNT, default=28) if layers == "some" else 0
    if layers == "some" and not enabled:
        window = None
    if window is not None and layers == "none":
        raise ValueError(f"sliding_window={window} is not supported for model_type {name!r}: it must be null")
    if window is not None and enabled is False:
        raise ValueError(f"sliding_window={window} contradicts use_sliding_window=False: make sliding_window null")
    implied = [
        "sliding_attention" if window is not None and layer >= (first or 0) else "full_attention"
        for layer in range(num_layers)
    ]
    types = read(mapping, "layer_types", NAMES) or implied
    if len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries but num_hidden_layers={num_layers}: give one per layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer type {kind!r} is not supported: use full_attention or sliding_attention")
    if types != implied and (layers != "some" or window is None):
        raise ValueError(
            f"layer_types={short(types)} contradicts the sliding window of model_type {name!r}, which is "
            f"{window}: remove layer_types or correct sliding_window and use_sliding_window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _write_one_window(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": next((window for window in config.windows if window is not None), None)}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    num_leading = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), config.num_layers)
    window = _write_one_window(config)["sliding_window"]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": num_leading,
        "layer_types": types,
    }


NO_LAYER = WindowRule(functools.partial(_read, layers="none"), lambda config: {})
ALL_LAYERS = WindowRule(functools.partial(_read, layers="all"), _write_one_window)
SOME_LAYERS = WindowRule(functools.partial(_read, layers="some"), _write_windows)
