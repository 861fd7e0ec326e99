"""Freed memory and zeros, measured in a process of its own."""

import mmap
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import Engine, EngineConfig, SamplingParams
from jaxserve.engine import memory
from tests import small_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")

PROGRAM = """
import ctypes, resource, sys
from jaxserve.engine import memory
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


def resident_pages(array: jax.Array) -> int:
    """Of the pages that are the array's alone, those in memory, as /proc/self/pagemap has it."""
    start = array.unsafe_buffer_pointer()
    first, end = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
    return int(np.sum(entries >> np.uint64(63)))


def test_zeros_take_memory_where_they_were_written_to_only():
    x, neighbour = jax.block_until_ready((jnp.zeros((4096, 4099), jnp.float32), jnp.ones((333,), jnp.int32)))
    assert resident_pages(x) > 16_000  # of 16,396
    memory.release_zeros([x, jnp.zeros((3,), jnp.int32)])
    assert resident_pages(x) == 0 and neighbour.tolist() == [1] * 333
    x = jax.jit(lambda x: x.at[7].set(5), donate_argnums=0)(x)
    assert 4 <= resident_pages(jax.block_until_ready(x)) <= 1024  # a row; more where pages are large
    assert np.asarray(x[7]).tolist() == [5] * 4099 and not np.any(x[:7]) and not np.any(x[8:])


def test_a_pool_takes_up_memory_as_it_is_used() -> None:
    config = EngineConfig(
        max_slots=2, max_model_len=64, num_pages=8000, attention_backend="reference", kv_dtype="float32"
    )
    engine = Engine(small_model.make_params(), small_model.MODEL, config)
    pools = jax.tree.leaves(engine.driver.state.pool)
    assert sum(pool.nbytes for pool in pools) > 16 << 20
    assert sum(map(resident_pages, pools)) == 0
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    assert not np.any(jax.tree.leaves(engine.driver.state.pool)[0][-1])  # what was never written to reads as zero
