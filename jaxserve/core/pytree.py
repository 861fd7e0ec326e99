"""Frozen dataclasses that are JAX pytrees: the form of every record in the engine's state."""

import dataclasses
from typing import Any, Self, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


class Record:
    """Base of all records: data and O(1) properties only; behaviour is module-level functions."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass, every field of which is a pytree child."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
