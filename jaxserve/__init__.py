"""jaxserve: LLM inference as a pure function, with continuous batching inside one jitted JAX program.

Importing this package imports none of its modules, and so neither JAX nor Flax. The module of a name is imported when the name
is first used (PEP 562), so that a command line can read its flags and print its help at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.core.beam_search import beam_search
    from jaxserve.core.make_submission import make_submission
    from jaxserve.core.programs import GPU_COMPILER_OPTIONS
    from jaxserve.core.scheduler import (
        EngineState,
        Handles,
        Status,
        Submission,
        abort,
        check_invariants,
        collect,
        init_state,
        submit,
    )
    from jaxserve.core.step import RunResults, StepOutput, StepOutputs, run, run_steps, step
    from jaxserve.demo_model import DEMO_MODEL
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.engine.beams import BeamParams, BeamSearchOutput, BeamSequence, make_beam_rules, search_beams
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.live_requests import Update
    from jaxserve.engine.queue import QueueFullError
    from jaxserve.engine.request_handle import EngineClosedError, RequestFailedError, RequestHandle
    from jaxserve.engine.stats import EngineStats, Histogram, Latencies
    from jaxserve.models import ModelConfig, Transformer
    from jaxserve.models.prepare import prepare
    from jaxserve.request import (
        CompletionOutput,
        Request,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        TokenLogprob,
    )

__all__ = [
    "DEMO_MODEL",
    "GPU_COMPILER_OPTIONS",
    "AsyncEngine",
    "BeamParams",
    "BeamSearchOutput",
    "BeamSequence",
    "CompletionOutput",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineState",
    "EngineStats",
    "Handles",
    "Histogram",
    "Latencies",
    "ModelConfig",
    "QueueFullError",
    "Request",
    "RequestFailedError",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "RunResults",
    "SamplingParams",
    "Status",
    "StepOutput",
    "StepOutputs",
    "Submission",
    "TokenLogprob",
    "Transformer",
    "Update",
    "abort",
    "beam_search",
    "check_invariants",
    "collect",
    "init_state",
    "make_beam_rules",
    "make_submission",
    "prepare",
    "run",
    "run_steps",
    "search_beams",
    "step",
    "submit",
]

_NAMES_OF_MODULE = {  # the imports above, for __getattr__
    "config": ("EngineConfig",),
    "core.beam_search": ("beam_search",),
    "core.make_submission": ("make_submission",),
    "core.scheduler": (
        "EngineState",
        "Handles",
        "Status",
        "Submission",
        "abort",
        "check_invariants",
        "collect",
        "init_state",
        "submit",
    ),
    "core.programs": ("GPU_COMPILER_OPTIONS",),
    "core.step": ("RunResults", "StepOutput", "StepOutputs", "run", "run_steps", "step"),
    "demo_model": ("DEMO_MODEL",),
    "engine.async_engine": ("AsyncEngine",),
    "engine.beams": ("BeamParams", "BeamSearchOutput", "BeamSequence", "make_beam_rules", "search_beams"),
    "engine.engine": ("Engine",),
    "engine.live_requests": ("Update",),
    "engine.queue": ("QueueFullError",),
    "engine.request_handle": ("EngineClosedError", "RequestFailedError", "RequestHandle"),
    "engine.stats": ("EngineStats", "Histogram", "Latencies"),
    "models": ("ModelConfig", "Transformer"),
    "models.prepare": ("prepare",),
    "request": ("CompletionOutput", "Request", "RequestMetrics", "RequestOutput", "SamplingParams", "TokenLogprob"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}
_SUBPACKAGES = ("config", "core", "demo_model", "engine", "grammar", "models", "request", "text", "timeline")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_NAME:
        value = getattr(importlib.import_module(f"jaxserve.{_MODULE_OF_NAME[name]}"), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"jaxserve.{name}")
    else:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    globals()[name] = value  # so that it is looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
