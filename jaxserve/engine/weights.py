"""An engine's weights: prepared for its backend, committed to their devices, replaceable only by weights of equal structure."""

from typing import Any, Self

import jax

from jaxserve.config import EngineConfig
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, prepare, unprepared


class Weights:
    """Prepared parameters, in one object that does not change, so that parameters of two `set_params` calls never mix.

    Attributes:
      leaves: the arrays.
      structure: the structure of their tree.
    """

    def __init__(self, params: Params, model: ModelConfig, config: EngineConfig) -> None:
        """Prepares parameters as from `nnx.split(Transformer(model))`; `config` has all capacities chosen."""
        self._model, self._config = model, config
        self._unprepared = unprepared(params, model)
        leaves, self.structure = jax.tree.flatten(prepare(_commit(params), model, config.backend, config.weight_dtype))
        self.leaves: tuple[jax.Array, ...] = tuple(leaves)

    @property
    def params(self) -> Params:
        """The prepared parameters as a tree."""
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def replicated(self) -> jax.sharding.Sharding:
        """The sharding for a state used with these weights: on their device, or replicated on each device of their mesh."""
        sharding = self.leaves[0].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return sharding

    def replaced(self, params: Params) -> Self:
        """Returns weights with other parameters, on the same devices.

        Raises:
          ValueError: if a leaf is missing, or has another shape or dtype than before.
        """
        old, new = (jax.tree_util.tree_flatten_with_path(tree) for tree in (self._unprepared, params))
        if old[1] != new[1]:
            raise ValueError("the new weights have another structure than the old ones: they must be of the same model")
        for (path, old_leaf), (_, leaf) in zip(old[0], new[0], strict=True):
            if (old_leaf.shape, old_leaf.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, but the engine was made for "
                    f"{old_leaf.dtype}{list(old_leaf.shape)}: convert it first"
                )
        params = prepare(params, self._model, self._config.backend, self._config.weight_dtype)
        shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        weights = object.__new__(type(self))
        weights.__dict__ = self.__dict__ | {"leaves": tuple(jax.tree.leaves(jax.device_put(params, shardings)))}
        return weights


def _commit(params: Params) -> Params:
    """Returns the same arrays, committed to their devices, because a compiled program needs them to stay there."""
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, params))
