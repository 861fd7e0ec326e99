"""A guard against compilations where there should be none (promise P1).

JAX reports every compilation by XLA through `jax.monitoring`, once it is done and in the thread that asked for it; a program
that is found in the persistent compilation cache is reported too, for it was not in memory. What a listener raises comes out
of the call that compiled.
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
    """Within it, a call that makes XLA compile anything raises; other threads are not affected. May be nested.

    Everything counts, also the small programs that `jax.numpy` makes of single operations on new shapes. The listener is
    registered on first use and stays; `jax.monitoring.clear_event_listeners` takes it away for good.

    Raises:
      UnexpectedCompilation: at the offending call, naming the program.
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
