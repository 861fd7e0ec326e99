"""Memory that the C library keeps after it was freed, given back to the system."""

import ctypes
import sys


def trim() -> None:
    """Returns free memory to the system where the C library is glibc: compiling leaves over a hundred MB of it."""
    if not sys.platform.startswith("linux"):
        return
    try:
        release = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    release(0)
