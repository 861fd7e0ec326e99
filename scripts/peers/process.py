"""Starts a peer in a process and an interpreter of its own, sends it requests, reads how much it uses, and ends it."""

import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from peers.memory import status_bytes

_PROC = pathlib.Path("/proc")
_SCRIPTS = pathlib.Path(__file__).parents[1]
_END_SECONDS = 10


class PeerError(RuntimeError):
    """A peer failed to do what a request asked for."""


class PeerUnavailable(PeerError):
    """A peer's packages or files are missing."""


class Peer(Protocol):
    """An engine that answers the requests of `peers.protocol`."""

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          PeerUnavailable: if something that the peer needs is not installed.
          PeerError: if the peer failed, ended, or took too long.
        """
        ...

    def usage(self) -> "Usage":
        """Returns what the peer has used of the machine so far."""
        ...


@dataclasses.dataclass(frozen=True)
class Usage:
    """The processor time and memory that a process and its children have used.

    Attributes:
      cpu_seconds: processor time of all cores since the start; None where there is no /proc.
      peak_bytes: sum of the peaks of resident memory of each process; None where there is no /proc.
    """

    cpu_seconds: float | None
    peak_bytes: int | None


class PeerProcess:
    """A driver module in a process; as a context manager it ends the process and its children.

    Args:
      python: path of the interpreter.
      module: the driver, such as "peers.vllm_driver".
      arguments: command-line arguments of the module.
      environment: environment variables to set or replace.

    Raises:
      PeerUnavailable: if there is no such interpreter.
    """

    def __init__(self, python: str, module: str, arguments: Sequence[str] = (), **environment: str) -> None:
        self._log = tempfile.TemporaryFile("w+", prefix="peer_")  # noqa: SIM115 (as long as the process)
        paths = [str(_SCRIPTS), str(_SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
                start_new_session=True,  # its children are known by the session
            )
        except OSError as error:
            self._log.close()
            raise PeerUnavailable(f"{python}: {error.strerror}") from error
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(f"no answer within {timeout_s:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"it ended by itself: {self._last_line()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise PeerUnavailable(answer["unavailable"])
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def usage(self) -> Usage:
        processes = session_processes(self._process.pid)
        if not processes:
            return Usage(None, None)
        peaks = [status_bytes(_PROC / str(pid) / "status", "VmHWM") or 0 for pid in processes]
        return Usage(sum(processes.values()), sum(peaks))

    def close(self) -> None:
        """Closes the peer's stdin, waits, and then kills all processes of its session."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(_END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        for pid in session_processes(self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended
        self._process.kill()  # has no effect on a process that has ended
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


def session_processes(session: int) -> dict[int, float]:
    """Returns the processor time in seconds of each process of a session by its id; empty where there is no /proc."""
    cpu_seconds: dict[int, float] = {}
    for entry in _PROC.glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:
            continue  # the process has ended
        fields = text.rpartition(")")[2].split()  # the name before it may have blanks
        if int(fields[3]) == session:
            cpu_seconds[int(entry.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return cpu_seconds
