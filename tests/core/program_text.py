"""Reads the text of a compiled program: its instructions, and whether it copies an array of a given shape."""

import collections
import re

import jax

from pallas_kernels.native import library

# What may yield an array of the pool's shape: what passes a buffer on, and the write into it. Bodies of fusions are seen too.
NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "fusion"}
WRITES = {"scatter", "dynamic-update-slice"}
ALLOWED_CUSTOM_CALLS = {"TopK", *library.TARGETS}  # XLA:CPU's own, and ours


def instructions(text: str) -> list[tuple[str, str]]:
    """Type of the result (a tuple's in brackets) and opcode of every instruction of a program."""
    return re.findall(r"^ +(?:ROOT )?%\S+ = (.*?) ([a-z-]+)\(", text, flags=re.MULTILINE)


def assert_in_place(program: jax.stages.Compiled, shape: tuple[int, ...], array_bytes: int, num_arrays: int) -> None:
    dims = f"[{','.join(map(str, shape))}]"
    found = collections.Counter(opcode for kind, opcode in instructions(program.as_text()) if dims in kind)
    assert found["parameter"] >= num_arrays  # the pattern finds something
    aliases = re.findall(r"output_to_operand_aliasing=\{(.*?\))\}", program.as_text())  # of native writes
    assert found["custom-call"] == len(aliases) and all(alias.count("(") == num_arrays for alias in aliases)
    assert not set(found) - NAMES - WRITES - {"custom-call"}, found
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < array_bytes
    assert memory.alias_size_in_bytes >= num_arrays * array_bytes
