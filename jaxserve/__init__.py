"""jaxserve: LLM inference as a pure function, with continuous batching inside one jitted JAX program."""

from jaxserve.config import EngineConfig
from jaxserve.demo import DEMO_MODEL
from jaxserve.engine import Engine
from jaxserve.models import ModelConfig, Transformer
from jaxserve.request import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    UnsupportedError,
)
from jaxserve.rows import make_submission
from jaxserve.scheduler import (
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
from jaxserve.sequence import Update
from jaxserve.step import GPU_COMPILER_OPTIONS, RunResults, StepOutput, StepOutputs, run, run_steps, step

__all__ = [
    "DEMO_MODEL",
    "GPU_COMPILER_OPTIONS",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineState",
    "Handles",
    "ModelConfig",
    "Request",
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
    "UnsupportedError",
    "Update",
    "abort",
    "check_invariants",
    "collect",
    "init_state",
    "make_submission",
    "run",
    "run_steps",
    "step",
    "submit",
]
