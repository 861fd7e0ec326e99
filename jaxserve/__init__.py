"""jaxserve: LLM inference as a pure function, with continuous batching inside one jitted JAX program."""

from jaxserve.config import EngineConfig
from jaxserve.core.beam_search import beam_search
from jaxserve.core.make_submission import make_submission
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
from jaxserve.core.step import GPU_COMPILER_OPTIONS, RunResults, StepOutput, StepOutputs, run, run_steps, step
from jaxserve.demo_model import DEMO_MODEL
from jaxserve.engine.async_engine import AsyncEngine, EngineClosedError, RequestFailedError, RequestHandle
from jaxserve.engine.beams import BeamParams, BeamSearchOutput, BeamSequence, make_beam_rules, search_beams
from jaxserve.engine.engine import Engine, QueueFullError
from jaxserve.engine.live_requests import Update
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
