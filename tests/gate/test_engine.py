"""The engine's programs as compiled for a GPU and a TPU: the pool in place, and on the GPU one command buffer in all."""

import pytest
from gate.compiler import TARGETS, compile_program, faults
from gate.programs import engine_program

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("name", ["step", "update", pytest.param("run_steps", marks=pytest.mark.slow)])
def test_a_program_is_one_command_buffer_that_writes_the_pool_in_place(name):
    program = engine_program(name, TARGETS["h200"], num_layers=2)
    report = compile_program(program, TARGETS["h200"])
    assert not faults(report, program, TARGETS["h200"])
    assert report.launches.one_command_buffer
    kernels = set() if name == "update" else {"rotary_write", "paged_chunk", "paged_decode"}
    assert {kernel.name for kernel in report.kernels} == kernels
    assert bool(report.launches.num_loops) == (name != "update")


@pytest.mark.slow
def test_a_step_on_a_tpu_writes_the_pool_in_place():
    program = engine_program("step", TARGETS["tpu_v5e"], num_layers=1)
    report = compile_program(program, TARGETS["tpu_v5e"])
    assert not faults(report, program, TARGETS["tpu_v5e"])
