"""Finds the kernels of jax-triton in a lowered program.

jax-triton compiles them while it lowers. Their PTX is in an argument of the custom call: a compressed protocol buffer,
`TritonAnyKernelCall` of jaxlib, which no public module decodes.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from jax.extend.mlir import ir


class CompiledKernel(NamedTuple):
    """A kernel that a call of jax-triton launches."""

    name: str
    ptx: str
    num_warps: int
    shared_memory_bytes: int
    grid: tuple[int, int, int]


def compiled_kernels(module: ir.Module) -> Iterator[CompiledKernel]:
    """Yields the kernels of a lowered program, in the order of their calls."""
    calls = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            if attributes["call_target_name"].value.startswith("triton_kernel_call"):
                typed = "mhlo.backend_config" in attributes  # jax-triton 0.4
                config = attributes["mhlo.backend_config"]["opaque"] if typed else attributes["backend_config"]
                calls.append(zlib.decompress(config.value_bytes))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for call in calls:
        launch = _fields(_fields(call)[1])
        kernel = _fields(launch[1])
        yield CompiledKernel(
            name=kernel[1].decode(),
            ptx=kernel[4].decode(),
            num_warps=kernel[2],
            shared_memory_bytes=kernel.get(3, 0),
            grid=(launch[2], launch[3], launch[4]),
        )


def _fields(message: bytes) -> dict[int, bytes | int]:
    """Returns the last value of each field by number. The fields read here are numbers and byte strings."""
    values: dict[int, bytes | int] = {}
    index = 0
    while index < len(message):
        tag, index = _varint(message, index)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            values[number], index = _varint(message, index)
        else:
            size = {1: 8, 5: 4}.get(wire_type, 0)
            if wire_type == 2:
                size, index = _varint(message, index)
            values[number] = message[index : index + size]
            index += size
    return values


def _varint(message: bytes, index: int) -> tuple[int, int]:
    """Decodes a number in groups of 7 bits, the lowest group first. Returns it and the index behind it."""
    value = shift = 0
    while True:
        byte = message[index]
        value |= (byte & 127) << shift
        shift, index = shift + 7, index + 1
        if byte < 128:
            return value, index
