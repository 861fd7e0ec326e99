"""Records: frozen dataclasses that are JAX pytrees."""

import dataclasses
from typing import Any, Self, TypeVar, dataclass_transform

import jax

from jaxserve.core.columns import column

T = TypeVar("T")


class Record:
    """The base class of all records. A record has data and O(1) properties only; behaviour is in module-level functions."""

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass_transform(frozen_default=True, field_specifiers=(column,))
def record(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose fields are all pytree children. A class decorator."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
