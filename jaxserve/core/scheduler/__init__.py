"""Continuous batching as data: the records of the state, and the pure transitions between steps."""

from jaxserve.core.scheduler.invariants import InvariantError, check_invariants
from jaxserve.core.scheduler.state import EngineState, Queue, SamplingArrays, Slots, Status, init_state
from jaxserve.core.scheduler.submission import Handles, Submission, abort, collect, submit

__all__ = [
    "EngineState",
    "Handles",
    "InvariantError",
    "Queue",
    "SamplingArrays",
    "Slots",
    "Status",
    "Submission",
    "abort",
    "check_invariants",
    "collect",
    "init_state",
    "submit",
]
