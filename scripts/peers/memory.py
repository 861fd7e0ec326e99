"""Resident memory of processes as Linux counts it. On systems without /proc only the peak of this process is known."""

import pathlib
import resource

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Returns the resident memory of this process; None where there is no /proc."""
    return status_bytes(_STATUS, "VmRSS")


def peak_bytes() -> int:
    """Returns the most resident memory that this process had since it started, or since `forget_peak`."""
    peak = status_bytes(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def forget_peak() -> None:
    """Sets the peak to the present resident memory; does nothing where the system does not support that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def status_bytes(path: pathlib.Path, name: str) -> int | None:
    """Returns an entry of a /proc/PID/status file in bytes; None if there is no such file or entry."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
