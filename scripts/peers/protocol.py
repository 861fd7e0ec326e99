"""How a peer is driven: JSON lines over its stdin and stdout, so that it may live in an interpreter of its own.

    {"do": "load", "settings": {...}}                             -> {"versions": {...}, ...}
    {"do": "run", "prompts": [[...]], "output_lengths": [...]}    -> {"seconds": 1.5, "token_ids": [[...]], ...}

A request that fails is answered by {"error": "..."}; a package that is not there by {"unavailable": "..."}. The end of stdin
ends the peer. Between requests it waits in a read, so that it takes no time from whoever runs then. Only the standard library
is used here.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all peers are told.

    Attributes:
      model: a checkpoint's directory in Hugging Face layout, with or without a tokenizer.
      dtype: of weights, keys and values.
      max_slots: sequences that run at the same time.
      max_model_len: longest sequence, tokens.
      chunk_size: prompt tokens per step, where a peer has such a limit.
      pool_bytes: for keys and values, where a peer takes a size.
      threads: cores to use.
      platform: "cpu" or "gpu".
      options: of this peer alone.
    """

    model: str
    dtype: str
    max_slots: int
    max_model_len: int
    chunk_size: int
    pool_bytes: int
    threads: int
    platform: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of the workload.

    Attributes:
      seconds: from the first request handed over to the last token in hand.
      token_ids: generated, per request.
      seconds_per_token: per request of two tokens or more, the time from its first to its last token over the tokens after the
        first; None: the peer does not tell.
      more: what only this peer has.
    """

    seconds: float
    token_ids: list[list[int]]
    seconds_per_token: list[float] | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


class Driver(Protocol):
    """One engine, loaded once and run as often as asked."""

    def load(self, settings: Settings) -> dict[str, Any]:
        """Loads weights; returns versions and other things worth recording."""
        ...

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        """Generates exactly `output_lengths` tokens for the prompts, greedily."""
        ...


def serve(driver: Driver) -> None:
    """Answers requests until stdin ends; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(driver, json.loads(line))) + "\n")
        answers.flush()


def answer(driver: Driver, message: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    try:
        if message["do"] == "load":
            return driver.load(Settings(**message["settings"]))
        return dataclasses.asdict(driver.run(message["prompts"], message["output_lengths"]))
    except ImportError as error:
        return {"unavailable": _sentence(error)}
    except Exception as error:  # whatever goes wrong in a peer is told by name, and does not end the benchmark
        return {"error": f"{type(error).__name__}: {_sentence(error)}"}


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
