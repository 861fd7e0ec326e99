"""Work that is skipped at run time where no row asks for it, without another program."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def if_any(wanted: Bool[Array, " R"], compute: Callable[[T], T], otherwise: T) -> T:
    """`compute(otherwise)` if any row wants it, as a loop of one trip or none: a cond would copy what it returns."""
    done = ~jnp.any(wanted)
    return lax.while_loop(lambda carry: ~carry[0], lambda carry: (~carry[0], compute(carry[1])), (done, otherwise))[1]
