"""The host's side: requests in, results out, around the compiled programs. `Engine` is the one mutable object."""

from jaxserve.engine.async_engine import AsyncEngine, EngineClosedError, RequestFailedError, RequestHandle
from jaxserve.engine.engine import Engine, QueueFullError

__all__ = ["AsyncEngine", "Engine", "EngineClosedError", "QueueFullError", "RequestFailedError", "RequestHandle"]
