"""The contract of a user's function on the logits: what it may change, and what it may remember."""

from typing import Any, Protocol

from jaxtyping import Array, Float32

from jaxserve.core.logit_rules import Context


class LogitsFn(Protocol):
    """A pure function of the logits from which tokens are drawn. It is traced into the step, so nothing leaves the device.

    It runs after the rules of `jaxserve.core.logit_rules` and before temperature, on R sequences at a time, of which some may
    be padding. What it returns for a sequence must depend on that sequence alone; then a request's tokens do not depend on
    its neighbours.
    """

    def __call__(self, aux: Any, logits: Float32[Array, "R V"], context: Context) -> tuple[Any, Float32[Array, "R V"]]:
        """Returns the new `aux` and new logits.

        Args:
          aux: the data that the function remembers of each sequence, a tree of arrays [R, ...]; the submission has its initial
            value. It belongs to the sequence, not to its slot: it survives preemption.
          logits: logits after the rules, -inf for forbidden tokens. If all are -inf, the sequence ends with "error".
          context: the sequences' tokens and lengths. The token drawn from these logits is the last one of the next call.

        Returns:
          The new `aux`, of the same shapes and dtypes, and the new logits.
        """
        ...
