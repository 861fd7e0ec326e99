"""Resident memory as Linux counts it; where there is no /proc, as far as the system tells."""

import pathlib
import resource

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Of this process, now; None: the system does not tell."""
    return status_bytes(_STATUS, "VmRSS")


def peak_bytes() -> int:
    """The most that this process had at a time since it started, or since `forget_peak`."""
    found = status_bytes(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def forget_peak() -> None:
    """Starts the peak again from what is resident now, where the system can."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def status_bytes(path: pathlib.Path, name: str) -> int | None:
    """An entry of a /proc/PID/status file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
