"""The table of sampling parameters: their defaults, rules, groups and meanings.

How to add one:
  1. Add a field to `SamplingParams`. It is then checked, and has a flag, its line in the help and in the documentation.
  2. If the device needs it, add a field of the same name to `SamplingArrays` in `jaxserve/core/sampling.py` or to
     `LogitRules` in `jaxserve/core/logit_rules.py`, marked as `column(off=..., parameter=True)`. For a number that is all:
     it is then copied from the request into the queue, and a submission made inside of a jit is checked. For a list,
     `fill_row` in `jaxserve/core/make_submission.py` needs a line that writes it.
  3. Apply it: beside the others in those two files, or on the host.
Tests walk all fields and name what is missing, the line in the table of `jaxserve/README.md` included.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxserve.request.parameter import check_fields, documented, parameter, unknown_name
from jaxserve.request.rules import Biases, Choice, Integer, Number, Switch, Texts, TokenIds

GREEDY_BELOW = 1e-5  # temperatures under this take the most likely token

LOGITS = "What changes the logits"
DRAW = "How a token is drawn"
STOP = "When it stops"
REPORT = "What is reported"
PROMPTS = "Prompts and output"


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Names and defaults are those of vLLM. What changes the logits is applied in the order of the list below, and so is what
    makes a sequence stop. Values are checked at construction and stored in a form that is hashable: lists as tuples.

    Raises:
      ValueError: if a value has the wrong type or is out of range, or values contradict each other.
    """

    allowed_token_ids: tuple[int, ...] | None = parameter(
        None, TokenIds(optional=True), LOGITS, "Only these token ids may be drawn; by default all."
    )
    bad_words: tuple[str | tuple[int, ...], ...] = parameter(
        (),
        Texts(),
        LOGITS,
        "Texts that are never completed: the last token of a spelling is not drawn where the tokens before it stand "
        "already, in the prompt too. A list of token ids counts as one spelling.",
    )
    min_tokens: int = parameter(
        0, Integer(0), LOGITS, "Nothing stops the sequence before so many tokens are generated."
    )
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = parameter(
        (), Biases(), LOGITS, "Numbers that are added to the logits of some token ids, each clamped to [-100, 100]."
    )
    repetition_penalty: float = parameter(
        1.0,
        Number(0, above=True),
        LOGITS,
        "Divides the positive logits of tokens in prompt or output and multiplies the negative ones: above 1 makes them "
        "less likely.",
    )
    frequency_penalty: float = parameter(
        0.0, Number(-2, 2), LOGITS, "Is subtracted from a token's logit for each time that the token was generated."
    )
    presence_penalty: float = parameter(
        0.0, Number(-2, 2), LOGITS, "Is subtracted from a token's logit if the token was generated."
    )

    temperature: float = parameter(
        1.0,
        Number(0, 2),
        DRAW,
        "Divides the logits. Below 1e-5 the most likely token is taken, and min_p, top_k and top_p have no effect.",
    )
    min_p: float = parameter(
        0.0, Number(0, 1), DRAW, "Drops the tokens that are less likely than this times the most likely one."
    )
    top_k: int = parameter(
        0, Integer(0, also=(-1,)), DRAW, "Keeps the k most likely tokens, and ties with the last of them; 0 or -1: all."
    )
    top_p: float = parameter(
        1.0, Number(0, 1, above=True), DRAW, "Then keeps the most likely tokens that together reach this probability."
    )
    seed: int | None = parameter(
        None,
        Integer(0, 2**64 - 1, optional=True),
        DRAW,
        "The same seed gives the same tokens, whatever runs beside it; by default each request has a seed of its own, which "
        "the result reports.",
    )
    n: int = parameter(
        1,
        Integer(1),
        DRAW,
        "Samples of the prompt, drawn independently. Several need a temperature above 0, or they would be alike.",
    )

    ignore_eos: bool = parameter(False, Switch(), STOP, "Go on after an end-of-sequence token, as after any other.")
    stop_token_ids: tuple[int, ...] = parameter(
        (),
        TokenIds(),
        STOP,
        "Token ids that end the sequence; the token stays in token_ids and is left out of the text.",
    )
    stop: tuple[str | tuple[int, ...], ...] = parameter(
        (),
        Texts(),
        STOP,
        "Texts that end the sequence wherever they show in the output, and are cut off it; the first to be completed wins. "
        "A list of token ids is matched token by token.",
    )
    include_stop_str_in_output: bool = parameter(False, Switch(), STOP, "Leave the text that ended the sequence in.")
    max_tokens: int = parameter(
        16, Integer(1), STOP, "Tokens to generate at most; clipped to what the longest sequence leaves."
    )

    logprobs: int | None = parameter(
        None,
        Integer(0, optional=True),
        REPORT,
        "Log probabilities: of this many most likely tokens and of the generated one, with ranks. At most the "
        "engine's max_logprobs.",
    )
    logprobs_mode: str = parameter(
        "raw",
        Choice(("raw", "processed")),
        REPORT,
        "Log probabilities of the model's distribution (raw), or of the one that is drawn from (processed), which leaves "
        "out tokens of probability 0.",
    )
    prompt_logprobs: int | None = parameter(
        None, Integer(0, optional=True), REPORT, "The same for each token of the prompt but the first; always raw."
    )
    detokenize: bool = parameter(True, Switch(), REPORT, "Turn tokens into text.")
    skip_special_tokens: bool = parameter(True, Switch(), REPORT, "Leave special tokens out of the text.")
    spaces_between_special_tokens: bool = parameter(
        True,
        Switch(),
        REPORT,
        "Let the decoder put what it wants between adjacent special tokens, where they are not left out; no: join them as "
        "they are.",
    )

    truncate_prompt_tokens: int | None = parameter(
        None,
        Integer(1, optional=True, also=(-1,)),
        PROMPTS,
        "Use only this many last tokens of the prompt; -1: as many as leave room for one token; by default all.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.n > 1 and self.greedy:
            raise ValueError(
                f"n={self.n} with temperature={self.temperature} would give the same sample {self.n} times: "
                "use n=1 or a higher temperature"
            )
        if self.stop_strings and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} needs text: leave detokenize on, or give token ids")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts in `stop`."""
        return tuple(entry for entry in self.stop if isinstance(entry, str))

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        """The lists of token ids in `stop`."""
        return tuple(entry for entry in self.stop if not isinstance(entry, str))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every position."""
        return self.temperature < GREEDY_BELOW

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns parameters made from names and values, as read from JSON.

        Raises:
          ValueError: if a name is unknown (the message has the nearest known one), or as the constructor does.
        """
        return cls().override(fields)

    def override(self, fields: Mapping[str, Any]) -> Self:
        """Returns a copy with some fields changed; raises as `from_dict` does."""
        for name in fields:
            if name not in self.__dataclass_fields__:
                raise ValueError(unknown_name("sampling parameter", name, self.__dataclass_fields__))
        return dataclasses.replace(self, **fields)
