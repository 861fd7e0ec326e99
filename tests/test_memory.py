"""What becomes of freed memory and of zeros, seen in a process of its own."""

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


RELEASING = """
import jax, jax.numpy as jnp, numpy as np
from jaxserve import memory
resident = lambda: int(open("/proc/self/statm").read().split()[1])
write = jax.jit(lambda x: x.at[7].set(5), donate_argnums=0)
x, neighbour = jax.block_until_ready((jnp.zeros((4096, 4099), jnp.float32), jnp.ones((333,), jnp.int32)))
before = resident()
memory.release_zeros([x, jnp.zeros((3,), jnp.int32)])
released = before - resident()
assert neighbour.tolist() == [1] * 333
x = write(x)
used = resident() - (before - released)
expected = np.zeros((4096, 4099), np.float32)
expected[7] = 5
np.testing.assert_array_equal(np.asarray(x), expected)
print(released, used)
"""


def test_zeros_take_memory_where_they_were_written_to_only():
    done = subprocess.run([sys.executable, "-c", RELEASING], capture_output=True, text=True, check=True)
    released, used = map(int, done.stdout.split())
    assert released > 16_000  # pages, of 16,396
    assert used < 8_000  # one row was written
