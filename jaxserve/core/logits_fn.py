"""User functions in the loop: what one may do to the logits, and what it may remember."""

from typing import Any, Protocol

from jaxtyping import Array, Float32

from jaxserve.core.logit_rules import Context


class LogitsFn(Protocol):
    """A pure function of the rows that draw a token, traced into the step; nothing leaves the device.

    It runs after the rules of `jaxserve.core.logit_rules` and before temperature, on a fixed number of rows at a time, of which
    some may be padding. A row's result must depend on that row alone; then a request's tokens do not depend on its neighbours.
    """

    def __call__(self, aux: Any, logits: Float32[Array, "R V"], context: Context) -> tuple[Any, Float32[Array, "R V"]]:
        """Changes logits, and what is remembered.

        Args:
          aux: what the function remembers of each sequence, a tree of arrays [R, ...] that starts as the submission says. It
            belongs to the sequence, not to its slot: it survives preemption.
          logits: as the rules leave them, -inf for what may not be drawn. A row of -inf only ends its sequence with "error".
          context: the sequences' tokens and lengths. The token drawn from these logits is the last one of the next call.

        Returns:
          The new `aux`, of the same shapes and dtypes, and the new logits.
        """
        ...
