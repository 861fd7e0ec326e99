"""The flags from which benchmarks make an engine: those of `python -m jaxserve.generate`, fitted to a workload.

`--model` is a checkpoint's directory or hub id, or a config.json file, which gets random weights; without it the demo model
serves. Every field of EngineConfig has a flag. Without their flags, the longest sequence is that of the workload, and the pool
has room for it in all slots.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from lib.workloads import WORKLOAD

from jaxserve import DEMO_MODEL, Engine, ModelConfig
from jaxserve.commands.flags import (
    ENGINE,
    MODEL,
    PROMPTS,
    EngineOptions,
    define_engine_flags,
    describe_flags,
    engine_options,
    parse_flags,
)
from jaxserve.commands.make_engine import make_engine
from jaxserve.models import checkpoint, families
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

BENCHMARK = "Benchmark"  # group of the flags that only one benchmark has

__all__ = [
    "BENCHMARK",
    "EngineOptions",
    "define_engine_flags",
    "fitted_options",
    "load_model",
    "make_engine",
    "make_warm_engine",
    "run_app",
]


def load_model(options: EngineOptions) -> tuple[ModelConfig, Tokenizer | None]:
    """Reads the parts of a model that a workload needs: hyperparameters, and the tokenizer (None with random weights).

    Raises:
      ValueError: if the model is missing or not valid.
    """
    if options.load_format == "dummy":
        return families.read_model_config(options.model or DEMO_MODEL), None
    directory = checkpoint.resolve_model(options.model or DEMO_MODEL)
    return families.read_model_config(directory), load_tokenizer(directory)


def fitted_options(values: flags.FlagValues, **defaults: Any) -> EngineOptions:
    """Reads the engine's flags; a config.json file implies --load_format=dummy.

    Args:
      values: parsed flags, including those of `define_engine_flags`.
      defaults: values for fields of EngineConfig whose flags are not set, such as `max_model_len=workload.longest`.

    Raises:
      ValueError: if a flag or the file of `--config` is not valid.
    """
    options = engine_options(values, **defaults)
    if options.model is not None and options.model.endswith(".json"):
        options = dataclasses.replace(options, load_format="dummy")
    return options


def make_warm_engine(options: EngineOptions) -> Engine:
    """Makes an engine and compiles its programs.

    Raises:
      ValueError: if the model or an option is not valid.
    """
    engine = make_engine(options)
    engine.warm_up()
    return engine


def run_app(main: Callable[[Sequence[str]], int], description: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs a benchmark whose flags are defined; --help prints them in groups, and a bad flag gets one sentence and status 1."""
    groups = (BENCHMARK, WORKLOAD, PROMPTS, MODEL, ENGINE)
    app.run(
        main,
        flags_parser=lambda argv: parse_flags(argv, values, lambda: f"{description}\n{describe_flags(values, groups)}"),
    )
