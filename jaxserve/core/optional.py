"""Work that one program skips at run time when nothing needs it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def if_any(needed: Bool[Array, " R"], compute: Callable[..., T], otherwise: T, *operands: Any) -> T:
    """Returns `compute(otherwise, *operands)` if any entry of `needed` is True, else `otherwise`.

    This is a loop of one trip or none, because a cond would copy what it returns. XLA moves computations that do not change
    from trip to trip out of a loop, and would then always do the work; a barrier hides from it that the operands do not
    change. So everything large that `compute` reads must be among the operands.

    Args:
      needed: entries for which the work is needed.
      compute: returns a tree of the shapes and dtypes of `otherwise`.
      otherwise: the result when nothing is needed; `compute` gets it as its first argument.
      operands: further arguments of `compute`, trees of arrays.
    """

    def once(carry: tuple[Bool[Array, ""], T]) -> tuple[Bool[Array, ""], T]:
        done, changing = lax.optimization_barrier((carry[0], operands))
        return ~done, compute(carry[1], *changing)

    return lax.while_loop(lambda carry: ~carry[0], once, (~jnp.any(needed), otherwise))[1]
