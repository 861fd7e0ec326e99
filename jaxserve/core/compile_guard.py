"""A guard against compilations where there should be none (promise P1).

JAX reports every compilation by XLA through `jax.monitoring`, when it is done and in the thread that compiled. It reports a
program from the persistent compilation cache too, because that was not in memory. An exception that a listener raises comes
out of the call that compiled.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_forbidden = contextvars.ContextVar("forbidden", default=False)


class UnexpectedCompilation(RuntimeError):
    """XLA compiled something inside `forbid_compilation`."""


@contextlib.contextmanager
def forbid_compilation() -> Iterator[None]:
    """Makes a context in which a call that makes XLA compile anything raises. It affects this thread only, and may be nested.

    Everything counts, even the small programs that `jax.numpy` makes of single operations on new shapes. The listener is
    registered on first use and stays; after `jax.monitoring.clear_event_listeners` the guard has no effect any more.

    Raises:
      UnexpectedCompilation: at the call that compiled; the message names the program.
    """
    _listen()
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **attributes: Any) -> None:
    if event == _COMPILED and _forbidden.get():
        raise UnexpectedCompilation(
            f"XLA compiled {attributes.get('fun_name', 'a program')!r} in {duration_secs:.2f} s where that is forbidden: "
            "an argument has another shape, dtype, sharding or weak type than during warm-up, or the warm-up left it out"
        )
