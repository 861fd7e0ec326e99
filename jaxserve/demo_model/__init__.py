"""Where the demo model lies: a small language model of Python source that comes with the package."""

import pathlib

DEMO_MODEL = str(pathlib.Path(__file__).parent)
