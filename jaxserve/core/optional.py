"""Work that is skipped at run time where no row asks for it, without another program."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def if_any(wanted: Bool[Array, " R"], compute: Callable[..., T], otherwise: T, *operands: Any) -> T:
    """`compute(otherwise, *operands)` if any row wants it: a loop of one trip or none, as a cond would copy what it returns.

    Whatever large `compute` reads must be among the operands. XLA moves computations that do not change from trip to trip out
    of a loop, and would always do what was to be skipped; the barrier makes it believe that the operands change.
    """

    def once(carry: tuple[Bool[Array, ""], T]) -> tuple[Bool[Array, ""], T]:
        done, changing = lax.optimization_barrier((carry[0], operands))
        return ~done, compute(carry[1], *changing)

    return lax.while_loop(lambda carry: ~carry[0], once, (~jnp.any(wanted), otherwise))[1]
