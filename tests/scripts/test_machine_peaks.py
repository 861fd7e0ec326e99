"""The machine's peaks: the best of all ways, in bounded time even where products are slow."""

import importlib.util
import json

import machine_peaks
import numpy as np
import pytest
from absl import flags
from lib import machine_rates, peaks, timing
from lib.peaks import affordable_sizes


class SlowMachine:
    """A clock that moves when a product is made: of n x n in 2 n^3 / rate seconds."""

    def __init__(self, flops_per_s: float) -> None:
        self.now, self.flops_per_s, self.sizes = 0.0, flops_per_s, []

    def perf_counter(self) -> float:
        return self.now

    def multiply(self, size: int) -> None:
        self.sizes.append(size)
        self.now += 2 * size**3 / self.flops_per_s


def test_the_machines_peaks_are_the_best_of_all_ways(monkeypatch):
    monkeypatch.setattr(machine_rates, "_CACHE_MB", 1)
    monkeypatch.setattr(machine_rates, "_REPEATS", 1)
    monkeypatch.setattr(machine_rates, "_SIZES", (64,))
    measured = machine_rates.measure(["float32"])
    products, reads = measured["all_matmul_flops_per_s"], measured["all_read_bytes_per_s"]
    assert measured["matmul"] == {"way": max(products, key=products.get), "flops_per_s": max(products.values())}
    assert measured["read"] == {"way": max(reads, key=reads.get), "bytes_per_s": max(reads.values())}
    torch = importlib.util.find_spec("torch") is not None
    assert products.keys() == {"XLA float32", *["torch float32 64"] * torch}
    assert reads.keys() == {"XLA sum", "XLA copy", "numpy sum", *["torch sum"] * torch}
    assert measured["provenance"]["platform"] == "cpu"


@pytest.mark.parametrize(("flops_per_s", "largest"), [(1e12, 2048), (4e9, 1024), (1e8, 256), (1e3, 128)])
def test_sizes_of_products_grow_as_long_as_they_fit_the_time(monkeypatch, flops_per_s, largest):
    machine = SlowMachine(flops_per_s)
    monkeypatch.setattr(machine_rates.time, "perf_counter", machine.perf_counter)
    rates = machine_rates.rates_by_size(lambda size: lambda: machine.multiply(size), machine_rates._SIZES)
    assert max(rates) == largest and rates[largest] == pytest.approx(flops_per_s)
    smallest_s = 2 * 128**3 / flops_per_s
    assert machine.now <= 1.5 * peaks.PRODUCT_BUDGET_S + 20 * smallest_s


def test_a_slow_product_of_xla_is_measured_with_small_matrices_and_noted(monkeypatch):
    """A bfloat16 product at 0.1 GFLOP/s, as on CPUs without AVX-512: 512 x 512 would take minutes in a hundred calls."""
    machine = SlowMachine(1e8)
    monkeypatch.setattr(timing.time, "perf_counter", machine.perf_counter)

    def fewest_seconds(call, carry, operand, repeats):
        del call, repeats
        if operand is None or carry.ndim == 0:
            return 1e-3  # copy and read
        return 2 * carry.shape[0] ** 3 / machine.flops_per_s

    monkeypatch.setattr(peaks, "_fewest_seconds", fewest_seconds)
    monkeypatch.setattr(peaks.jax, "jit", lambda _: lambda x, w: machine.multiply(x.shape[0]))
    monkeypatch.setattr(machine_rates, "_torch_products", lambda dtype: {128: 1e8})
    monkeypatch.setattr(machine_rates, "_torch_read", lambda num_bytes: {})
    monkeypatch.setattr(machine_rates, "_numpy_read", lambda num_bytes: {})
    measured = machine_rates.measure(["bfloat16"])
    assert measured["all_matmul_flops_per_s"]["XLA bfloat16"] == pytest.approx(1e8)
    assert set(machine.sizes) == {128} and machine.now < peaks.PRODUCT_BUDGET_S
    assert measured["notes"] == [
        "XLA bfloat16: products of 128 x 128; 512 x 512 would take more than 10 s",
        "torch bfloat16: products of 128 x 128; 2048 x 2048 would take more than 10 s",
    ]


def test_the_first_size_is_always_taken_and_later_ones_by_the_speed_before_them():
    seconds = {1: 1.0, 2: 4.0, 4: 9.0}
    assert affordable_sizes(seconds.__getitem__, (1, 2, 4), num_calls=1, budget_s=0.5) == [1]
    assert affordable_sizes(seconds.__getitem__, (1, 2, 4), num_calls=1, budget_s=8.9) == [1]  # 8 s expected, 7.9 left
    assert affordable_sizes(seconds.__getitem__, (1, 2, 4), num_calls=1, budget_s=9.0) == [1, 2]
    assert affordable_sizes(seconds.__getitem__, (1, 2, 4), num_calls=1, budget_s=37.0) == [1, 2, 4]


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    machine_peaks.define_flags(values)
    values(["machine_peaks", *arguments])
    return machine_peaks.main(["machine_peaks"], values)


def test_the_command_prints_one_line_of_json(monkeypatch, capsys):
    monkeypatch.setattr(machine_peaks, "measure", lambda dtypes: {"dtypes": list(dtypes), "rate": np.pi})
    assert run("--dtypes=float32,bfloat16") == 0
    assert json.loads(capsys.readouterr().out)["dtypes"] == ["float32", "bfloat16"]


def test_unknown_dtypes_of_peaks_are_refused(capsys):
    assert run("--dtypes=int4") == 1
    assert capsys.readouterr().err == "error: --dtypes: 'int4' is unknown: use bfloat16, float16, float32\n"
