"""The host's side: requests in, results out, around the compiled programs. `Engine` is the one mutable object."""

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.queue import QueueFullError
from jaxserve.engine.request_handle import EngineClosedError, RequestFailedError, RequestHandle

__all__ = ["AsyncEngine", "Engine", "EngineClosedError", "QueueFullError", "RequestFailedError", "RequestHandle"]
