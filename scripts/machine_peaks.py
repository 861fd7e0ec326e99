"""Measures the best matmul rate and memory bandwidth that any of several simple programs reaches on the device.

    python scripts/machine_peaks.py --dtypes=bfloat16,float32

The command prints one JSON line; rates are per second. On a CPU the programs are XLA's and, where it is installed, PyTorch's
products of square matrices, and reads by XLA, by PyTorch and by one NumPy thread per core over an array that no cache holds. On
accelerators they are XLA's. Each program that multiplies has about 10 seconds per dtype: sizes grow as long as the next one
fits, and "notes" in the output names the programs that did not get to their largest size. CPUs without AVX-512 take seconds to
minutes for a large product in bfloat16.
"""

import json
from collections.abc import Sequence

from absl import app, flags
from lib.command import run_command
from lib.flag_values import names
from lib.machine_rates import measure

DTYPES = ("bfloat16", "float16", "float32")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flag of the command."""
    flags.DEFINE_list(
        "dtypes", ["bfloat16", "float32"], f"Dtypes of the products: {', '.join(DTYPES)}.", flag_values=values
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Prints the peaks and returns the exit status."""
    return run_command(argv, lambda: _run(values.dtypes))


def _run(dtypes: Sequence[str]) -> int:
    print(json.dumps(measure(names("dtypes", dtypes, DTYPES, all_allowed=False))), flush=True)
    return 0


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
