"""Beam search as a pure function."""

from jaxserve.core.beam_search.capacities import longest, pages_per_request
from jaxserve.core.beam_search.search import advance, beam_search, start
from jaxserve.core.beam_search.state import BeamRules, BeamState, Hypotheses

__all__ = [
    "BeamRules",
    "BeamState",
    "Hypotheses",
    "advance",
    "beam_search",
    "longest",
    "pages_per_request",
    "start",
]
