"""Makes `oracle`, `submissions` and `traces`, beside the tests here, importable; `scripts/soak_scheduler.py` does the same."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
