"""Skips the compile gate where its compilers are missing; with --require_gate, as in CI, it fails there."""

import pytest
from gate import compiler as gate_compiler


@pytest.fixture(scope="session", autouse=True)
def compilers(request):
    missing = sorted({name for platform in ("cuda", "tpu") for name in gate_compiler.missing_packages(platform)})
    if not missing:
        return
    message = f"no {', '.join(missing)} here: pip install --no-deps $(python scripts/compile_gate.py --requirements)"
    if request.config.getoption("--require_gate"):
        pytest.fail(message)
    pytest.skip(message)
