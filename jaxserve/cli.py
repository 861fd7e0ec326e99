"""What the command lines share: flags for an engine and for sampling, turned at once into records.

Nothing is defined on import: a command line calls `define_engine_flags` and `define_sampling_flags` itself.
"""

import logging
import pathlib
import typing
from typing import Any

from absl import flags

from jaxserve.config import EngineConfig, read_json_object
from jaxserve.demo import DEMO_MODEL
from jaxserve.request import SamplingParams
from pallas_kernels.backend import BACKENDS

DTYPES = ("bfloat16", "float32", "float16")

_CAPACITIES = {
    "max_slots": "Sequences that run at the same time.",
    "num_pages": "Pages in the KV pool; by default as many as fit.",
    "page_size": "Tokens per page; a power of two from 8 to 256.",
    "max_model_len": "Longest sequence, prompt and output; by default the model's, at most 2048.",
    "chunk_size": "Most prompt tokens that one step prefills, over all sequences.",
    "max_queue": "Rows for waiting, running and finished sequences on the device; by default 4 per slot.",
    "max_logprobs": "Most tokens that a request may ask logprobs for.",
    "max_stop_token_ids": "Most token ids that end one sequence, end-of-sequence ids included.",
    "tile_rows": "Rows that go through the model at once; by default 32, or on accelerators as many as slots.",
    "max_steps_per_call": "Most steps between two looks of the host.",
}

_SAMPLING = {
    "temperature": "In [0, 2]; 0 takes the most likely token.",
    "top_k": "Keep the k most likely tokens; 0: all.",
    "top_p": "In (0, 1]; keep the most likely tokens that together reach this probability.",
    "min_p": "In [0, 1]; drop tokens less likely than this times the most likely one.",
    "max_tokens": "Tokens to generate at most.",
    "logprobs": "Report this many most likely tokens beside the sampled one.",
}

_SAMPLING_SWITCHES = {
    "ignore_eos": "Go on after an end-of-sequence token.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "spaces_between_special_tokens": "Let the decoder put what it wants between special tokens.",
}


def define_engine_flags() -> None:
    """Flags that `make_engine` reads: the model and the fields of EngineConfig."""
    flags.DEFINE_string("model", None, "Checkpoint directory, or a Hugging Face hub id; by default the demo model.")
    flags.DEFINE_enum("load_format", "auto", ["auto", "dummy"], "dummy: random weights for a config.json file.")
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the weights, and of keys and values.")
    flags.DEFINE_string("config", None, "Engine configuration, a JSON file; flags override it.")
    flags.DEFINE_string(
        "compilation_cache_dir", "~/.cache/jaxserve/compiled", "Keeps compiled programs; empty: do not."
    )
    flags.DEFINE_integer("seed", 0, "What the seeds of requests without one are derived from.")
    for name, text in _CAPACITIES.items():
        flags.DEFINE_integer(name, None, text)
    flags.DEFINE_boolean(
        "deterministic", None, "Bitwise independence of a request from its neighbours (on by default)."
    )
    flags.DEFINE_boolean("debug_checks", None, "Check the invariants of the state after every step; slow.")
    flags.DEFINE_enum(
        "attention_backend",
        None,
        list(BACKENDS),
        "What attends to pages; by default triton on NVIDIA GPUs, tpu on TPUs.",
    )
    flags.DEFINE_boolean(
        "interpret_kernels", None, "Run the kernels of triton or tpu in an interpreter, on any device; very slow."
    )


def define_sampling_flags(**defaults: Any) -> None:
    """Flags that `sampling_params` reads: the supported fields of SamplingParams, with some defaults changed."""
    types = typing.get_type_hints(SamplingParams)
    for name, text in _SAMPLING.items():
        define = flags.DEFINE_float if types[name] is float else flags.DEFINE_integer
        define(name, defaults.get(name, getattr(SamplingParams, name)), text)
    for name, text in _SAMPLING_SWITCHES.items():
        flags.DEFINE_boolean(name, getattr(SamplingParams, name), text)
    flags.DEFINE_multi_integer("stop_token_ids", [], "Token ids that end a sequence; repeatable.")


def sampling_params() -> SamplingParams:
    """Sampling parameters from flags.

    Raises:
      ValueError: if one is out of range.
    """
    names = [*_SAMPLING, *_SAMPLING_SWITCHES, "stop_token_ids"]
    return SamplingParams.from_dict({name: flags.FLAGS[name].value for name in names})


def make_engine() -> Any:
    """The engine that the flags describe.

    Raises:
      ValueError: if the model, the configuration file or a flag is not valid.
    """
    import jax

    from jaxserve.engine import Engine
    from jaxserve.models import checkpoint

    logging.getLogger("jax").setLevel(logging.ERROR)
    if flags.FLAGS.compilation_cache_dir:
        cache = pathlib.Path(flags.FLAGS.compilation_cache_dir).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    path = flags.FLAGS.model or DEMO_MODEL
    if flags.FLAGS.load_format == "auto":
        path = str(checkpoint.resolve_model(path))
    config = _engine_config()
    return Engine.from_pretrained(
        path,
        dtype=flags.FLAGS.dtype,
        config=config,
        load_format=flags.FLAGS.load_format,
        seed=flags.FLAGS.seed,
    )


def _engine_config() -> EngineConfig:
    fields = read_json_object(flags.FLAGS.config, "engine config") if flags.FLAGS.config is not None else {}
    for name in (*_CAPACITIES, "deterministic", "debug_checks", "attention_backend", "interpret_kernels"):
        value = flags.FLAGS[name].value
        if value is not None:
            fields[name] = value
    return EngineConfig.from_dict(fields)
