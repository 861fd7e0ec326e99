"""The engine's static configuration: every capacity that is part of a compiled program's shape."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from jaxserve.request import unknown_name
from pallas_kernels.backend import BACKENDS, resolve_backend

KV_DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_DTYPES = ("int8",)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Capacities and switches of an engine; hashable, so it can be a static argument of a jitted function.

    Attributes:
      max_slots: S, sequences that run at the same time.
      num_pages: N, pages in the KV pool; None: as many as fit, chosen at start-up.
      page_size: T, tokens per page; a power of two from 8 to 256.
      max_model_len: M, longest sequence, tokens of prompt and output together; None: 2048, or in an Engine what its model
        was made for if that is less. `max_sequence_len` is the number.
      chunk_size: C, most prompt tokens that one step prefills, over all sequences.
      max_queue: Q, rows for sequences that wait, run, or are finished and not collected; None: 4 * max_slots.
      max_waiting: most requests that wait on the host before the Engine refuses more (`QueueFullError`); None: no bound.
      max_logprobs: most tokens a request may ask logprobs for.
      max_stop_token_ids: most token ids that end one sequence, end-of-sequence ids included.
      max_stop_sequences, max_stop_sequence_len: most sequences of token ids that end one sequence, and their longest.
      max_logit_bias: most token ids with a bias per request.
      max_bad_words, max_bad_word_len: most bad words per request (spellings count), and their most tokens.
      penalties: whether requests may have penalties; costs 4 bytes per slot and token of the vocabulary.
      tile_rows: rows that go through the model at once, see `tile_sizes`; None: 32, or on accelerators all slots.
      max_steps_per_call: most steps that one `run_steps` call runs.
      deterministic: whether a request's tokens and logprobs are bitwise independent of what runs beside it.
      debug_checks: whether the invariants of the state are checked after every call (slow).
      kv_dtype: of keys and values: "float32", "bfloat16" or "float16"; None: that of the weights as they were loaded.
      weight_dtype: of weight matrices: "int8", with a scale per output column ("native" only); None: as they were loaded.
      attention_backend: what attends and writes to pages: "triton" (NVIDIA GPUs), "jax_triton" (the same decode kernel
        through jax-triton), "tpu", "native" (C++ on CPUs; it multiplies and samples too), or "reference" (plain JAX, any
        device); None: the default of the platform.
      interpret_kernels: whether the kernels of "triton" and "tpu" run in Pallas' interpreter, on any device: to test and
        debug, very slow.

    Raises:
      ValueError: if a value has the wrong type or is out of range, or the pool cannot hold one longest
        sequence.
    """

    max_slots: int = 32
    num_pages: int | None = None
    page_size: int = 16
    max_model_len: int | None = None
    chunk_size: int = 256
    max_queue: int | None = None
    max_waiting: int | None = 4096
    max_logprobs: int = 20
    max_stop_token_ids: int = 8
    max_stop_sequences: int = 4
    max_stop_sequence_len: int = 8
    max_logit_bias: int = 32
    max_bad_words: int = 8
    max_bad_word_len: int = 8
    penalties: bool = True
    tile_rows: int | None = None
    max_steps_per_call: int = 32
    deterministic: bool = True
    debug_checks: bool = False
    kv_dtype: str | None = None
    weight_dtype: str | None = None
    attention_backend: str | None = None
    interpret_kernels: bool = False

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            self._check_int(name, low)
        for name in ("penalties", "deterministic", "debug_checks", "interpret_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.queue_size < self.max_slots:
            raise ValueError(
                f"max_queue={self.max_queue} must be at least max_slots={self.max_slots}: a slot needs a row"
            )
        if self.page_size not in _PAGE_SIZES:
            raise ValueError(f"page_size={self.page_size} must be one of {', '.join(map(str, _PAGE_SIZES))}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype={self.kv_dtype!r} must be one of {', '.join(KV_DTYPES)}, or null")
        if self.weight_dtype is not None and self.weight_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weight_dtype={self.weight_dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}, or null")
        if self.attention_backend is not None and self.attention_backend not in BACKENDS:
            raise ValueError(
                f"attention_backend={self.attention_backend!r} must be one of {', '.join(BACKENDS)}, or null"
            )
        if self.num_pages is not None and self.num_pages < self.pages_per_slot:
            raise ValueError(
                f"num_pages={self.num_pages} cannot hold one longest sequence, max_model_len={self.max_sequence_len} "
                f"tokens in pages of {self.page_size}: use at least {self.pages_per_slot} pages or shorter sequences"
            )

    def _check_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("num_pages", "max_model_len", "max_queue", "max_waiting", "tile_rows"):
            return
        if type(value) is not int or not low <= value < 2**31:
            raise ValueError(f"{name}={value!r} must be an integer from {low} to {2**31 - 1}")

    @property
    def max_sequence_len(self) -> int:
        """M, tokens of the longest sequence: `max_model_len`, or 2048 if that is None."""
        return _MAX_SEQUENCE_LEN if self.max_model_len is None else self.max_model_len

    @property
    def pages_per_slot(self) -> int:
        """P, pages of one longest sequence."""
        return -(-self.max_sequence_len // self.page_size)

    @property
    def queue_size(self) -> int:
        """Q, rows of the queue."""
        return 4 * self.max_slots if self.max_queue is None else self.max_queue

    @property
    def backend(self) -> str:
        """The backend that `attention_backend` stands for; looks for a device if that is None.

        Raises:
          ValueError: if it does not serve these keys and values, or these weights.
        """
        backend = resolve_backend(self.attention_backend)
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
        """R, rows of the narrowest tile of the forward pass.

        On an accelerator a tile costs one read of the weights, so one holds all decode rows, in multiples of 16.
        """
        if self.tile_rows is not None:
            return self.tile_rows
        return 32 if self.backend in ("reference", "native") else -(-self.max_slots // 16) * 16

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Rows per tile of the forward pass, widest first; one size only if deterministic: bits depend on it."""
        rows = self.tile_size
        return (rows,) if self.deterministic or 4 * rows > self.max_batch_size else (4 * rows, rows)

    @property
    def max_batch_size(self) -> int:
        """B, rows of the largest step: one per decoding slot and a full chunk, in whole tiles."""
        return -(-(self.max_slots + self.chunk_size) // self.tile_size) * self.tile_size

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """A configuration from names and values.

        Raises:
          ValueError: if a name is unknown, or as the constructor.
        """
        for name in fields:
            if name not in cls.__dataclass_fields__:
                raise ValueError(unknown_name("engine option", name, cls.__dataclass_fields__))
        return cls(**fields)

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> Self:
        """A configuration from a JSON file, such as those in `configs/engine/`.

        Raises:
          ValueError: if the file cannot be read or is not a JSON object, a key is unknown, or a value is not
            valid; the message names the file.
        """
        try:
            return cls.from_dict(read_json_object(path, "engine config"))
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_json_object(path: str | pathlib.Path, kind: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ValueError: naming the file, which is a `kind`, if it cannot be read, is not JSON or not an object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
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
_PAGE_SIZES = (8, 16, 32, 64, 128, 256)
_LOWEST = {
    "max_slots": 1,
    "num_pages": 1,
    "page_size": 1,
    "max_model_len": 2,
    "chunk_size": 1,
    "max_queue": 1,
    "max_waiting": 1,
    "max_logprobs": 0,
    "max_stop_token_ids": 1,
    "max_stop_sequences": 0,
    "max_stop_sequence_len": 1,
    "max_logit_bias": 0,
    "max_bad_words": 0,
    "max_bad_word_len": 1,
    "tile_rows": 1,
    "max_steps_per_call": 1,
}
