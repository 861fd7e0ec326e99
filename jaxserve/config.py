"""The engine's static configuration: every capacity that is part of a compiled program's shape.

A new option is one field of `EngineConfig`: its check, its flag and its line in the help come from the declaration.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from jaxserve.request import Choice, Integer, Rule, Switch, check_fields, documented, parameter, unknown_name
from pallas_kernels.backend import BACKENDS, resolve_backend

KV_DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_DTYPES = ("int8",)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
ENGINE = "Engine"  # the group of the options, where command lines list them


def _option(default: Any, rule: Rule, meaning: str) -> Any:
    return parameter(default, rule, ENGINE, meaning)


@documented
@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Capacities and switches of an engine; hashable, so it can be a static argument of a jitted function.

    Raises:
      ValueError: if a value has the wrong type or is out of range, or the pool cannot hold one longest
        sequence.
    """

    # Behind a field stands its axis letter, if the state has one.
    max_slots: int = _option(32, Integer(1), "Sequences that run at the same time.")  # S
    num_pages: int | None = _option(
        None, Integer(1, optional=True), "Pages in the KV pool; by default as many as fit, chosen at start-up."
    )  # N
    page_size: int = _option(16, Choice(PAGE_SIZES), "Tokens per page; a power of two from 8 to 256.")  # T
    max_model_len: int | None = _option(
        None,
        Integer(2, optional=True),
        "Tokens of the longest sequence, prompt and output together; by default 2048, or in an Engine what its model was made "
        "for if that is less.",
    )  # M, which `max_sequence_len` gives
    chunk_size: int = _option(256, Integer(1), "Most prompt tokens that one step prefills, over all sequences.")  # C
    max_queue: int | None = _option(
        None,
        Integer(1, optional=True),
        "Rows of the device's queue, for sequences that wait, run, or are finished and not collected; by default 4 per slot.",
    )  # Q, which `queue_size` gives
    max_waiting: int | None = _option(
        4096, Integer(1, optional=True), "Most requests that wait on the host; more are refused. null: no bound."
    )
    max_logprobs: int = _option(20, Integer(0), "Most tokens that a request may ask log probabilities for.")
    max_stop_token_ids: int = _option(
        8, Integer(1), "Most token ids that end one sequence, end-of-sequence ids included."
    )
    max_stop_sequences: int = _option(4, Integer(0), "Most sequences of token ids that end one sequence.")
    max_stop_sequence_len: int = _option(8, Integer(1), "Most tokens in one of these stop sequences.")
    max_logit_bias: int = _option(32, Integer(0), "Most token ids with a bias per request.")
    max_bad_words: int = _option(8, Integer(0), "Most bad words per request; each spelling counts.")
    max_bad_word_len: int = _option(8, Integer(1), "Most tokens in one bad word.")
    penalties: bool = _option(
        True, Switch(), "Whether requests may have penalties; costs 4 bytes per slot and token of the vocabulary."
    )
    tile_rows: int | None = _option(
        None,
        Integer(1, optional=True),
        "Rows that go through the model at once; by default 32, or on accelerators as many as slots.",
    )  # see `tile_sizes`
    max_steps_per_call: int = _option(
        32, Integer(1), "Most steps that the device runs before the host reads what they gave."
    )
    deterministic: bool = _option(
        True,
        Switch(),
        "Whether the bits of a request's tokens and log probabilities are independent of its neighbours.",
    )
    debug_checks: bool = _option(False, Switch(), "Check the invariants of the state after every call; slow.")
    kv_dtype: str | None = _option(
        None,
        Choice(KV_DTYPES, optional=True),
        "The dtype of keys and values; by default that of the weights as loaded.",
    )
    weight_dtype: str | None = _option(
        None,
        Choice(WEIGHT_DTYPES, optional=True),
        "With int8 the engine rounds weight matrices to 8 bits after loading, with a scale per output column (backend native "
        "only); by default they stay as loaded.",
    )
    attention_backend: str | None = _option(
        None,
        Choice(BACKENDS, optional=True),
        "The kernels for attention and for writing to pages: triton (NVIDIA GPUs), jax_triton (the same decode kernel through "
        "jax-triton), tpu, native (C++ on CPUs; it multiplies and samples too) or reference (plain JAX, any device); by "
        "default triton on NVIDIA GPUs, tpu on TPUs, native on CPUs.",
    )
    interpret_kernels: bool = _option(
        False, Switch(), "Run the kernels of triton or tpu in Pallas' interpreter, on any device, for tests; very slow."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.queue_size < self.max_slots:
            raise ValueError(
                f"max_queue={self.max_queue} must be at least max_slots={self.max_slots}: a slot needs a row"
            )
        if self.num_pages is not None and self.num_pages < self.pages_per_slot:
            raise ValueError(
                f"num_pages={self.num_pages} cannot hold one longest sequence, max_model_len={self.max_sequence_len} "
                f"tokens in pages of {self.page_size}: use at least {self.pages_per_slot} pages or shorter sequences"
            )

    @property
    def max_sequence_len(self) -> int:
        """M, the tokens of the longest sequence: `max_model_len`, or 2048 if that is None."""
        return _MAX_SEQUENCE_LEN if self.max_model_len is None else self.max_model_len

    @property
    def pages_per_slot(self) -> int:
        """P, the pages of one longest sequence."""
        return -(-self.max_sequence_len // self.page_size)

    @property
    def queue_size(self) -> int:
        """Q, the number of rows of the queue."""
        return 4 * self.max_slots if self.max_queue is None else self.max_queue

    @property
    def backend(self) -> str:
        """The backend that `attention_backend` stands for; None stands for the default of JAX's default device.

        Raises:
          ValueError: if it does not serve these keys and values, or these weights.
        """
        return self.backend_on(None)

    def backend_on(self, platform: str | None) -> str:
        """Returns the backend that `attention_backend` stands for on the devices of a platform; errors as for `backend`.

        Args:
          platform: as `jax.Device.platform`; None: that of JAX's default device.
        """
        backend = resolve_backend(self.attention_backend, platform)
        if backend == "native" and self.kv_dtype == "float16":
            if self.attention_backend is not None:
                raise ValueError("attention_backend='native' has no kv_dtype='float16': use bfloat16, or 'reference'")
            backend = "reference"
        if backend != "native" and self.weight_dtype is not None:
            raise ValueError(
                f"weight_dtype={self.weight_dtype!r} needs the backend 'native', but with attention_backend="
                f"{self.attention_backend!r} and kv_dtype={self.kv_dtype!r} it is {backend!r}: leave weight_dtype out, or use "
                "'native' on a CPU, and bfloat16 or float32 for weights as they are loaded, keys and values"
            )
        return backend

    @property
    def tile_size(self) -> int:
        """R, the rows that go through the model at once in its narrowest tile.

        On an accelerator each tile reads all weights once, so one tile holds a row for every slot, in multiples of 16.
        """
        if self.tile_rows is not None:
            return self.tile_rows
        return 32 if self.backend in ("reference", "native") else -(-self.max_slots // 16) * 16

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """The rows per tile, widest tile first. If deterministic there is only one size, because bits depend on it."""
        rows = self.tile_size
        return (rows,) if self.deterministic or 4 * rows > self.max_batch_size else (4 * rows, rows)

    @property
    def max_batch_size(self) -> int:
        """B, the rows of the largest step: one per decoding slot and a full chunk, rounded up to whole tiles."""
        return -(-(self.max_slots + self.chunk_size) // self.tile_size) * self.tile_size

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the configuration with these fields.

        Raises:
          ValueError: if a name is unknown or a value is not valid.
        """
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise ValueError(unknown_name("engine option", name, cls.__dataclass_fields__))
        return cls(**fields)

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> Self:
        """Reads a configuration from a JSON file, such as those in `configs/engine/`.

        Raises:
          ValueError: if the file cannot be read or is not a JSON object, a key is unknown, or a value is not
            valid; the message names the file.
        """
        try:
            return cls.from_dict(read_json_object(path, "engine config"))
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_json_object(path: str | pathlib.Path, kind: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: the file.
      kind: the name of this kind of file in error messages.

    Raises:
      ValueError: naming the file, if it cannot be read, is not JSON or not an object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(
                f"key {next(name for name in names if names.count(name) > 1)!r} is there twice: leave one out"
            )
        return dict(pairs)

    try:
        fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"cannot read {kind} {path}: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return fields


_MAX_SEQUENCE_LEN = 2048
