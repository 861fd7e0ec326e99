"""The protocol of peers: JSON lines over stdin and stdout, so that each may have an interpreter of its own.

    {"do": "load", "settings": {...}}                             -> {"versions": {...}, ...}
    {"do": "run", "prompts": [[...]], "output_lengths": [...]}    -> {"seconds": 1.5, "token_ids": [[...]], ...}

The answer to a request that fails is {"error": "..."}, or {"unavailable": "..."} if a package is missing. The end of stdin ends
the peer. Between requests it waits in a read, so it takes no processor time from the engine that runs. This module needs the
standard library only, because interpreters import it that may lack all packages.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all peers get.

    Attributes:
      model: a checkpoint's directory in Hugging Face layout, with or without a tokenizer.
      dtype: dtype of weights, keys and values.
      max_slots: sequences that run at the same time.
      max_model_len: longest sequence, tokens.
      chunk_size: prompt tokens per step, for peers that have such a limit.
      pool_bytes: memory for keys and values, for peers that take a size.
      threads: cores to use.
      platform: "cpu" or "gpu".
      options: settings of this peer alone.
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
      token_ids: generated tokens of each request.
      seconds_per_token: per request of two tokens or more, the time from its first to its last token over the tokens after the
        first; None if the peer does not report it.
      more: figures that only this peer has.
    """

    seconds: float
    token_ids: list[list[int]]
    seconds_per_token: list[float] | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


class Driver(Protocol):
    """An engine that is loaded once and run again and again."""

    def load(self, settings: Settings) -> dict[str, Any]:
        """Loads weights, and returns versions and further facts for the records."""
        ...

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        """Generates exactly `output_lengths` tokens for the prompts, greedily."""
        ...


def serve(driver: Driver) -> None:
    """Answers requests until stdin ends; the output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(driver, json.loads(line))) + "\n")
        answers.flush()


def answer(driver: Driver, message: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer to one request."""
    try:
        if message["do"] == "load":
            return driver.load(Settings(**message["settings"]))
        return dataclasses.asdict(driver.run(message["prompts"], message["output_lengths"]))
    except ImportError as error:
        return {"unavailable": _sentence(error)}
    except Exception as error:  # a failure of a peer is reported and does not end the benchmark
        return {"error": f"{type(error).__name__}: {_sentence(error)}"}


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
