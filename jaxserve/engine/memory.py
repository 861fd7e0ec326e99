"""Process memory: keeps malloc buffers, and drops pages of zeros that were never written to."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

import jax

_LARGEST_KEPT = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MADV_DONTNEED = 4  # from Linux's mman.h


def keep_buffers() -> None:
    """Makes glibc keep freed memory, up to 256 MB, for the next allocation, in the whole process.

    On CPU XLA allocates a program's temporary arrays anew on each call. By default glibc returns arrays of over 32 MB to the
    system each time, and the system has to clear every page again when they are next used. That takes up to a quarter of a
    step's time if the host reads after each step. The setting has no effect on arrays of over 64 MB (vocabularies of over
    50,000) in XLA's own threads.
    """
    if (c_library := _c_library()) is None or not hasattr(c_library, "mallopt"):
        return
    # Older versions refuse more than 32 MB. Setting the second option alone would stop glibc from adjusting the first.
    if c_library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or c_library.mallopt(_M_MMAP_THRESHOLD, 32 << 20):
        c_library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)


def trim() -> None:
    """Returns free memory to the system where the C library is glibc: compiling leaves over a hundred MB of it."""
    if (c_library := _c_library()) is not None and hasattr(c_library, "malloc_trim"):  # other C libraries lack it
        c_library.malloc_trim(0)


def release_zeros(arrays: Iterable[jax.Array]) -> None:
    """Gives the memory of arrays of zeros back to the system (Linux, CPU), which supplies zeroed pages as they are written.

    So a KV pool takes only as much memory as has been used of it.

    Args:
      arrays: arrays in which every bit is zero; other arrays would lose their contents.
    """
    c_library = _c_library()
    if c_library is None:
        return
    c_library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for array in arrays:
        for shard in jax.block_until_ready(array).addressable_shards:
            if shard.device.platform == "cpu":
                start = shard.data.unsafe_buffer_pointer()
                first = -(-start // mmap.PAGESIZE)  # pages from `first` to `end` hold nothing but this array
                end = (start + shard.data.nbytes) // mmap.PAGESIZE
                if first < end:
                    c_library.madvise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _MADV_DONTNEED)


def _c_library() -> ctypes.CDLL | None:
    """Returns the C library; None if the system is not Linux."""
    try:
        return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    except OSError:
        return None
