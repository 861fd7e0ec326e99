"""The compile gate's readers, on texts as XLA writes them, and its command line. `tests/gate` compiles."""

import compile_gate
import jax
import jax.numpy as jnp
import pytest
from gate import compiler as gate_compiler
from gate import dump as gate_dump
from gate.compiler import TARGETS, Program, Report
from gate.dump import Kernel, Launches, large_sorts, pool_copies

LAUNCH_LIST = """\
000: kCommandBuffer [source       | next=002 (1)]
    001: kCustomKernel [source | sink] paged_decode grid: [8, 64, 1] threads: [128, 1, 1]  shared_memory: 71680 bytes
002: kCopy         [prev=000 (1) | next=003 (1)] kCopy
003: kWhile        [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | sink]
        005: kCopy         [source       | next=006 (1)] kCopy
        006: kWhile        [prev=005 (1) | sink        ]
condition:
            007: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
          body:
            008: kCustomKernel [source | sink] rotary_write__1 grid: [8, 16, 1] threads: [64, 1, 1]  shared_memory: 512 bytes
"""
HLO = """\
HloModule jit_step, is_scheduled=true

%fused_write (param_0: bf16[99,8], param_1: s32[4]) -> bf16[99,8] {
  %param_0 = bf16[99,8]{1,0} parameter(0)
  ROOT %scatter.1 = bf16[99,8]{1,0} scatter(%param_0, %param_1, %c), to_apply=%region
}

%fused_read (param_0.1: bf16[99,8]) -> f32[4] {
  %param_0.1 = bf16[99,8]{1,0} parameter(0)
  %convert.1 = f32[99,8]{1,0} convert(%param_0.1)
  ROOT %gather.1 = f32[4]{0} gather(%convert.1)
}

ENTRY %main.1 (pages: bf16[99,8]) -> bf16[99,8] {
  %pages = bf16[99,8]{1,0} parameter(0)
  %read = f32[4]{0} fusion(%pages), kind=kLoop, calls=%fused_read
  %write = bf16[99,8]{1,0} fusion(%pages, %read), kind=kInput, calls=%fused_write
  %rotary = (bf16[99,8]{1,0}, f32[4]{0}) custom-call(%write, %read), output_to_operand_aliasing={{0}: (0, {})}
  ROOT %kept = bf16[99,8]{1,0} get-tuple-element(%rotary), index=0
}
"""


def test_the_launch_list_tells_what_is_in_a_command_buffer():
    launches = list(gate_dump._read_launches(LAUNCH_LIST))
    decode, write = (
        next(launch for launch in launches if launch.name.startswith(name)) for name in ("paged", "rotary")
    )
    assert (decode.grid, decode.num_threads, decode.shared_memory_bytes) == ((8, 64, 1), 128, 71680)
    assert write.enclosing_kinds == ("While", "CommandBuffer", "While")
    assert gate_dump._summary(launches) == Launches(
        num_kernels=4,
        num_copies=2,
        num_loops=2,
        num_command_buffers=2,
        num_host_loops=1,
        outside={"Copy": 1, "While": 1, "CustomKernel": 1},
    )


def test_what_passes_the_pool_on_or_writes_to_it_is_no_copy():
    assert not list(pool_copies(HLO, (99, 8)))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("%pages, %read), kind=kInput", "%copy.1, %read), kind=kInput", []),
        (
            "ROOT %kept = bf16[99,8]{1,0} get-tuple-element(%rotary), index=0",
            "ROOT %kept = bf16[99,8]{0,1} copy(%g)",
            ["copy"],
        ),
        ("output_to_operand_aliasing={{0}: (0, {})}", "metadata={}", ["custom-call"]),
        ("scatter(%param_0", "scatter(%convert.9", []),
        (
            "  ROOT %scatter.1",
            "  %select.1 = bf16[99,8]{1,0} select(%p, %param_0, %q)\n  ROOT %scatter.1",
            ["fusion of scatter, select"],
        ),
        (
            "ROOT %scatter.1 = bf16[99,8]{1,0} scatter",
            "ROOT %multiply.1 = bf16[99,8]{1,0} multiply",
            ["fusion of multiply"],
        ),
        ("(bf16[99,8]{1,0}, f32[4]{0}) custom-call", "(bf16[99,8]{1,0}, bf16[99,8]{1,0}) custom-call", ["custom-call"]),
    ],
)
def test_a_copy_of_the_pool_is_seen_in_hlo(old, new, found):
    assert old in HLO
    assert [copy.removesuffix(" in main.1") for copy in pool_copies(HLO.replace(old, new), (99, 8))] == found


def test_sorts_of_many_elements_are_those_that_cub_can_do():
    line = "  %sort.1 = {} sort(%a), dimensions={{1}}, to_apply=%less"
    pair = "(f32[128,8192]{1,0}, s32[128,8192]{1,0})"
    assert list(large_sorts(line.format(pair))) == ["(f32[128,8192], s32[128,8192])"]
    assert not list(large_sorts(line.format("(s32[128]{0}, s32[128]{0})")))
    assert not list(large_sorts(line.format("(f32[128,8192]{1,0}, f32[128,8192]{1,0}, s32[128,8192]{1,0})")))


def report(**changes) -> Report:
    kernel = Kernel("paged_decode", 80, 0, 0, 71680, 4, 3, (8, 64, 1))
    fields = {
        "target": "h200",
        "program": "step",
        "seconds": 1.0,
        "kernels": (kernel,),
        "launches": Launches(9, 0, 1, 1, 0, {}),
        "pool_copies": (),
        "large_sorts": (),
        "temp_bytes": 100,
        "alias_bytes": 4000,
    }
    return Report(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": (Kernel("k", 255, 8, 4, 0, 4, 3, (1, 1, 1)),)}, "k spills 8 bytes"),
        (
            {"kernels": (Kernel("k", 80, 0, 0, 232449, 4, 3, (1, 1, 1)),)},
            "k asks for 232449 bytes of shared memory, of 232448",
        ),
        ({"kernels": (Kernel("k", 80, 0, 0, 0, 4, 3, (1, 1, 1), ("a is serialized",)),)}, "k: a is serialized"),
        ({"pool_copies": ("copy in main.1",)}, "copied or worked on as a whole: copy in main.1"),
        ({"alias_bytes": 3999}, "only 3999 bytes are written in place, of a pool of 4000"),
        ({"temp_bytes": 2000}, "2000 bytes of temporaries"),
        ({"launches": Launches(9, 0, 1, 2, 1, {"While": 1})}, "2 command buffers, and outside of them 1 While"),
        ({"launches": Launches(1, 0, 0, 0, 0, {"CustomKernel": 1})}, "0 command buffers"),
        ({"large_sorts": ("f32[9]",)}, "the sort that yields f32[9]"),
    ],
)
def test_each_fault_is_a_sentence(changes, message):
    pool = jax.ShapeDtypeStruct((1000,), jnp.bfloat16)
    program = Program("step", None, (), pool=pool, num_written=2, one_command_buffer=True)
    assert not gate_compiler.faults(report(), program, TARGETS["h200"])
    (fault,) = gate_compiler.faults(report(**changes), program, TARGETS["h200"])
    assert message in fault


def test_missing_compilers_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setattr(gate_compiler, "missing_packages", lambda platform: ["triton"])
    with pytest.raises(
        ValueError, match="needs triton, not installed here: pip install --no-deps 'jax-cuda13-plugin=="
    ):
        gate_compiler.compile_program(Program("step", None, ()), TARGETS["a100"])


def test_what_fails_to_compile_is_a_fault(monkeypatch):
    monkeypatch.setattr(gate_compiler, "missing_packages", lambda platform: ["triton"])
    outcome = compile_gate.examine(Program("step", None, ()), TARGETS["tpu_v6e"])
    assert outcome.report is None and outcome.faults[0].startswith("ValueError: target tpu_v6e needs triton")


def test_requirements_follow_the_installed_jaxlib(monkeypatch):
    monkeypatch.setattr(gate_compiler.importlib.metadata, "version", lambda name: "0.11.7")
    assert gate_compiler.requirements()[:2] == ["jax-cuda13-plugin==0.11.7", "jax-cuda13-pjrt==0.11.7"]
    monkeypatch.setattr(gate_compiler.importlib.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(ValueError, match="jaxlib 0.12.0 is not known to the gate"):
        gate_compiler.requirements()


def test_tables_show_kernels_and_verdicts():
    good = compile_gate.Outcome("h200", "step", report(), [])
    bad = compile_gate.Outcome("a100", "step", None, ["it does not compile"])
    kernels = compile_gate.table(compile_gate.kernel_rows([good, bad])).splitlines()
    assert kernels[1].split()[:6] == ["h200", "step", "paged_decode", "80", "0", "0"]
    programs = compile_gate.table(compile_gate.program_rows([good, bad])).splitlines()
    assert programs[1].endswith("ok") and programs[2].split()[-5:] == ["-", "it", "does", "not", "compile"]
    assert '"faults": ["it does not compile"]' in bad.as_json() and '"registers": 80' in good.as_json()


def test_a_pattern_that_matches_nothing_is_refused():
    assert [program.name for program in compile_gate.chosen(TARGETS["h200"], ["chunk/phi-2/*16"])] == [
        "chunk/phi-2/bfloat16",
        "chunk/phi-2/float16",
        "chunk/phi-2/uint16",
    ]
    with pytest.raises(
        ValueError, match="'decoed/\\*' matches none for h200: use operation/shape/dtype, of decode, chunk"
    ):
        compile_gate.chosen(TARGETS["h200"], ["decoed/*"])


def test_a_program_without_support_on_the_target_is_not_offered():
    assert not [
        program for program in compile_gate.chosen(TARGETS["a100"], ["decode/phi-2/*"]) if "e4m3" in program.name
    ]
