"""Finds the work of a compiled program on large arrays that no loop of zero trips can skip."""

import math
import re

import jax

ROWS, VOCAB = 6, 4099  # a large array has at least VOCAB - 2 elements
_PASSES_ON = {"parameter", "get-tuple-element", "tuple", "while", "copy", "bitcast", "opt-barrier"}
_PICKS = {"gather", "slice", "dynamic-slice"}  # read a few elements of an array, unless the result is large too


def large_work(function, *arguments) -> list[str]:
    """Instructions outside of all loops that make a large array, or read all of one.

    Neither the shape nor the type of the array matters, so work that XLA fused with a reduction, or moved to another layout, is
    seen as well. A fusion counts once, if any of its instructions counts.
    """
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bodies = dict(re.findall(r"^(?:ENTRY )?(%\S+) \(.*?\{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL))
    (entry,) = re.findall(r"^ENTRY (%\S+)", text, flags=re.MULTILINE)
    return _work_of(entry, bodies)


def _work_of(name: str, bodies: dict[str, str]) -> list[str]:
    large, work = set(), []
    pattern = r"^ +(?:ROOT )?(%\S+) = (.*?) ([a-z-]+)\((.*?)\)(?:, (.*))?$"
    for result, kind, opcode, operands, attributes in re.findall(pattern, bodies[name], flags=re.MULTILINE):
        makes_large = any(_num_elements(dims) >= VOCAB - 2 for dims in re.findall(r"\w\[([\d,]*)\]", kind))
        reads_large = any(operand in large for operand in re.findall(r"%[\w.-]+", operands))
        if makes_large:
            large.add(result)
        if opcode in _PASSES_ON or not (makes_large or reads_large) or (opcode in _PICKS and not makes_large):
            continue
        called = re.search(r"calls=(%[\w.-]+)", attributes)
        if opcode != "fusion" or called is None or _work_of(called[1], bodies):
            work.append(opcode)
    return work


def _num_elements(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)
