"""The decode kernel through jax-triton: its results in Triton's own interpreter, and that it compiles without a GPU.

Triton decides when it is imported whether it interprets, so those cases run in a process of their own, which is this file.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from pallas_kernels.paged_attention import decode_attention, jax_triton_decode
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from tests.pallas_kernels.cases import NUM_SLOTS, assert_close, make_case

_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Name: shape, dtype of the pages, splits. Small ones, as Triton's interpreter is slow.
CASES = {
    "one split": (AttentionShape("", 3, 1, 64, page_size=32), "float32", 1),
    "three splits": (AttentionShape("", 3, 1, 64, page_size=32), "float32", 3),
    "more splits than tiles, pages of 8": (AttentionShape("", 2, 2, 16, page_size=8), "float16", 16),
    "window and sinks": (AttentionShape("", 4, 1, 64, window=40, sinks=True), "bfloat16", 2),
    "window and sinks, one split": (AttentionShape("", 4, 1, 64, window=100, sinks=True), "float16", 1),
    "softcap, head_dim 256": (AttentionShape("", 2, 1, 256, window=150, softcap=50.0), "float16", 2),
    "bits of bfloat16, group of 7, pages of 16": (AttentionShape("", 14, 2, 64, page_size=16), "uint16", 2),
    "integers, pages of 128": (AttentionShape("", 4, 1, 128, page_size=128), "int8", 2),
    "head_dim 80": (AttentionShape("", 2, 2, 80), "float16", 1),
    "e4m3": (AttentionShape("", 2, 2, 64), "float8_e4m3fn", 1),
    "e5m2": (AttentionShape("", 4, 2, 64), "float8_e5m2", 2),
    "more heads than one program takes": (AttentionShape("", 45, 1, 16, page_size=16, sinks=True), "float32", 2),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What is wrong with each of `CASES`."""
    pytest.importorskip("triton", reason='needs triton: pip install "jaxserve[triton]"')
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_softmax_attention_and_rows_do_not_depend_on_each_other(interpreted, name):
    assert interpreted[name] == ""


def _what_is_wrong(shape: AttentionShape, dtype: str, num_splits: int) -> str:
    case = make_case(shape, dtype, pages_per_slot=2 if shape.page_size >= 64 else 4).poisoned()
    attend = functools.partial(jax_triton_decode.decode_attention, **case.options, num_splits=num_splits)
    out = attend(*case.rows)
    try:
        assert_close(out, case, "float32" if dtype in ("float32", *_MULTIPLIED_AS_FLOAT32) else "float16")
    except AssertionError as error:
        return str(error)
    row = int(np.flatnonzero(case.slot < NUM_SLOTS)[-1])
    alone = case.replace(slot=np.where(np.arange(len(case.slot)) == row, case.slot, NUM_SLOTS).astype(np.int32))
    alone_out = attend(*alone.rows)
    if (alone_out[row] != out[row]).any():
        return f"row {row} has other bits when it is alone"
    return "rows without a slot are not 0" if np.delete(alone_out, row, axis=0).any() else ""


_MULTIPLIED_AS_FLOAT32 = ("bfloat16", "uint16")  # the interpreter multiplies the bits of bfloat16 as integers


def _interpret(*arrays, kernel, grid, out_type, **options):
    """`jax_triton.triton_call`, interpreted. What kernels leave unwritten is NaN."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    if "COMPUTE" in constants and constants["COMPUTE"].name == "bf16":
        constants["COMPUTE"] = type(constants["COMPUTE"])("fp32")
    outs = jax.tree.map(lambda out: np.full(out.shape, np.nan, out.dtype), out_type)
    kernel[grid](*(_Tensor(np.asarray(x)) for x in (*arrays, *jax.tree.leaves(outs))), **constants)
    return outs


@dataclasses.dataclass
class _Tensor:
    """What Triton's interpreter asks of a tensor, for a NumPy array."""

    array: np.ndarray

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def itself(self, *_, **__) -> "_Tensor":
        """Copies to the host and back are none: the array is there."""
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = itself


@pytest.mark.parametrize(
    ("name", "dtype", "num_splits"),
    [
        ("llama3-8b", "bfloat16", 8),
        ("llama3-8b-page16", "float8_e4m3fn", 1),
        ("gemma2-2b", "float16", 4),
        ("gpt-oss-20b", "int8", None),
        ("phi-2", "uint16", 2),
        ("qwen2-0.5b", "float32", 2),
    ],
)
def test_kernels_compile_for_hopper_without_one_and_spill_no_registers(monkeypatch, name, dtype, num_splits):
    pytest.importorskip("jax_triton", reason='needs jax-triton: pip install "jaxserve[triton]"', exc_type=ImportError)
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("needs JAX's CUDA plugin")
    from jax_triton import triton_lib

    shape, results = SHAPES[name], []
    compile_ttir = triton_lib.compile_ttir_inplace

    def recording(*args, **kwargs):
        results.append(compile_ttir(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", recording)
    case = make_case(shape, dtype)
    options = {**case.options, "num_splits": num_splits, "compute_capability": 90}
    attend = functools.partial(jax_triton_decode.decode_attention, **options)
    jax.jit(attend).trace(*case.rows).lower(lowering_platforms=("cuda",))

    kernels = {result.name: result for result in results}
    attending = kernels["decode_whole" if num_splits in (1, None) else "decode_split"]
    assert len(kernels) == 1 if attending.name == "decode_whole" else kernels.keys() == {"decode_split", "combine"}
    assert "cp.async" in attending.binary  # pages are loaded ahead
    for result in kernels.values():
        assert ".target sm_90a" in result.binary
        assert result.shared_mem_bytes <= 227 * 1024
        assert _spilled_bytes(result.binary) == 0


def _spilled_bytes(ptx: str) -> int:
    import triton

    (assembler, *_) = sorted(pathlib.Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"), reverse=True)
    command = [assembler, "-v", "-arch=sm_90a", "-", "-o", os.devnull]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def test_without_jax_triton_the_error_names_what_to_install(monkeypatch):
    case = make_case(SHAPES["llama-135m"], "float32")
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(
        ValueError, match=r'needs jax-triton .*: pip install "jaxserve\[triton\]", or use backend \'triton\''
    ):
        decode_attention(*case.rows, backend="jax_triton")


def test_it_cannot_be_interpreted_by_pallas():
    case = make_case(SHAPES["llama-135m"], "float32")
    with pytest.raises(ValueError, match="'jax_triton' cannot be interpreted: interpret 'triton'"):
        decode_attention(*case.rows, backend="jax_triton", interpret=True)


def test_importing_the_backend_imports_neither_triton_nor_jax_triton():
    code = "import sys; from pallas_kernels.paged_attention import jax_triton_decode; "
    code += "sys.exit(bool({'triton', 'jax_triton'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)


def test_what_the_kernels_do_not_support_is_refused():
    pytest.importorskip("jax_triton", reason='needs jax-triton: pip install "jaxserve[triton]"', exc_type=ImportError)
    case = make_case(SHAPES["llama-135m"], "float32")
    with pytest.raises(ValueError, match="num_splits 0 is not in 1..128"):
        decode_attention(*case.rows, backend="jax_triton", num_splits=0)
    with pytest.raises(ValueError, match="pages of uint32 are not supported"):
        decode_attention(*case.replace(k=case.k.view(np.uint32), v=case.v.view(np.uint32)).rows, backend="jax_triton")


if __name__ == "__main__":
    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=_interpret)
    print(json.dumps({name: _what_is_wrong(*case) for name, case in CASES.items()}))
