"""What the C library does with freed memory, seen in page faults of a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")

PROGRAM = """
import ctypes, resource, sys
from jaxserve import memory
c_library = ctypes.CDLL(None)
c_library.malloc.restype, c_library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c_library.free.argtypes = [ctypes.c_void_p]
SIZE = 48 << 20

def faults_of_using_a_buffer():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = c_library.malloc(SIZE)
    ctypes.memset(buffer, 1, SIZE)
    c_library.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    memory.keep_buffers()
found = [faults_of_using_a_buffer() for _ in range(3)]
resident = int(open("/proc/self/statm").read().split()[1])
memory.trim()
print(*found, resident - int(open("/proc/self/statm").read().split()[1]))
"""


def measure(*arguments: str) -> tuple[list[int], int]:
    """Page faults of using a buffer of 48 MB three times, and pages that `trim` gave back then."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    *faults, freed = map(int, done.stdout.split())
    return faults, freed


def test_buffers_that_are_kept_fault_once_and_can_be_given_back():
    faults, freed = measure("keep")
    assert faults[0] > 20 and max(faults[1:]) <= 2
    assert freed > 10_000  # of 12,288


def test_without_keeping_every_use_faults():
    """Else the measurement above shows nothing."""
    faults, freed = measure()
    assert min(faults) > 20 and freed < 2_000
