"""The request: one prompt, and how to continue it."""

import dataclasses
from typing import Any

from jaxserve.request.rules import MAX_INT32, check_ids, check_int, check_text
from jaxserve.request.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how to continue it.

    Attributes:
      id: chosen by the user; names the result.
      prompt: text; None if the request came as tokens.
      prompt_token_ids: tokens, at least one; None until the text is encoded. Used as they are if both are
        given.
      params: sampling parameters.
      priority: lower goes first; ties in the order of arrival.
      aux: the initial value of what the engine's `logits_fn` remembers for this request; None: the engine's `aux`.
    """

    id: str
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    priority: int = 0
    aux: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"id={self.id!r} must be a string that is not empty")
        check_text("id", self.id)
        if self.prompt is None and self.prompt_token_ids is None:
            raise ValueError(f"request {self.id!r} has no prompt: give prompt or prompt_token_ids")
        if self.prompt is not None:
            check_text("prompt", self.prompt)
        if self.prompt_token_ids is not None:
            ids = check_ids("prompt_token_ids", self.prompt_token_ids)
            if not ids:
                raise ValueError("prompt_token_ids=[] must have at least one token id")
            object.__setattr__(self, "prompt_token_ids", ids)
        if not isinstance(self.params, SamplingParams):
            raise ValueError(f"params={self.params!r} must be a SamplingParams")
        object.__setattr__(self, "priority", check_int("priority", self.priority, -MAX_INT32))
