"""The name of the default device, and its free memory."""

import os
import pathlib
import platform

import jax


def device_name() -> str:
    """Returns the kind of the default device; for a CPU its model and its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"


def free_bytes() -> int:
    """Returns the free memory that the default device reports, or the system's free memory if it reports none (CPUs)."""
    reported = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in reported:
        return reported["bytes_limit"] - reported.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
