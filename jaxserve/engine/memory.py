"""Process memory: keeps malloc buffers, and drops pages of zeros that were never written to."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

import jax

_LARGEST_KEPT = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MADV_DONTNEED = 4  # of Linux's mman.h


def keep_buffers() -> None:
    """Makes glibc keep freed memory, up to 256 MB, for the next allocation, in the whole process.

    On CPU XLA allocates a program's temporary arrays anew on each call. By default glibc returns those of over 32 MB to the
    system each time, which has to clear page after page when they are used again: up to a quarter of the time of a step, if
    the host reads after each one. Out of its reach are arrays of over 64 MB (vocabularies of over 50,000) in XLA's own threads.
    """
    if (c_library := _c_library()) is None or not hasattr(c_library, "mallopt"):
        return
    # Older ones refuse more than 32 MB. To set the second option alone would stop glibc's own adjustment of the first.
    if c_library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or c_library.mallopt(_M_MMAP_THRESHOLD, 32 << 20):
        c_library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)


def trim() -> None:
    """Returns free memory to the system where the C library is glibc: compiling leaves over a hundred MB of it."""
    if (c_library := _c_library()) is not None and hasattr(c_library, "malloc_trim"):  # others have none
        c_library.malloc_trim(0)


def release_zeros(arrays: Iterable[jax.Array]) -> None:
    """Gives the memory of arrays of zeros back to the system (Linux, CPU), which zeroes new memory where they are written to.

    So a KV pool takes as much memory as was ever used of it.

    Args:
      arrays: arrays of which every bit is zero; others would lose what they hold.
    """
    c_library = _c_library()
    if c_library is None:
        return
    c_library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for array in arrays:
        for shard in jax.block_until_ready(array).addressable_shards:
            if shard.device.platform == "cpu":
                start = shard.data.unsafe_buffer_pointer()
                first = -(-start // mmap.PAGESIZE)  # page that is the array's alone, as all before `end` are
                end = (start + shard.data.nbytes) // mmap.PAGESIZE
                if first < end:
                    c_library.madvise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _MADV_DONTNEED)


def _c_library() -> ctypes.CDLL | None:
    """Returns the C library; None if the system is not Linux."""
    try:
        return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    except OSError:
        return None
