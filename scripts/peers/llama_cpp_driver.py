"""The driver of llama.cpp's server, which has continuous batching; a thread per request asks it over HTTP.

The server gets a GGUF file with the same weights (`gguf_weights.py`). Its cache of prompts is off, because a second round would
find the prompts of the first in it. Times per token are the server's own.
"""

import concurrent.futures
import http.client
import json
import pathlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from peers.protocol import Round, Settings, serve

_START_SECONDS = 120
_REQUEST_SECONDS = 3600


class LlamaCpp:
    """llama.cpp's `llama-server`, which ends with this process."""

    def load(self, settings: Settings) -> dict[str, Any]:
        """Writes the weights as GGUF and starts the server, whose path is `settings.options["server"]`."""
        server = settings.options["server"]
        try:
            answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            raise ImportError(f"{server}: {error.strerror}") from error
        from peers.gguf_weights import write_gguf

        self._directory = tempfile.TemporaryDirectory(prefix="llama_cpp_")
        weights = pathlib.Path(self._directory.name) / "model.gguf"
        write_gguf(pathlib.Path(settings.model), weights, settings.dtype)
        self._port = _free_port()
        self._max_slots = settings.max_slots
        command = [server, *server_arguments(settings, str(weights), self._port)]
        self._log = open(pathlib.Path(self._directory.name) / "server.log", "w+")  # noqa: SIM115 (open as long as the server runs)
        self._server = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._wait_until_ready()
        version = next((line for line in (answer.stdout + answer.stderr).splitlines() if "version" in line), "unknown")
        return {
            "versions": {"llama.cpp": version.partition("version:")[2].strip() or version},
            "arguments": command[3:],
        }

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            start = time.perf_counter()
            answers = list(pool.map(self._complete, prompts, output_lengths))
            seconds = time.perf_counter() - start
        spans = [answer["timings"] for answer in answers if answer["timings"]["predicted_n"] > 1]
        return Round(
            seconds,
            [answer["tokens"] for answer in answers],
            [span["predicted_ms"] / 1e3 / (span["predicted_n"] - 1) for span in spans] or None,
        )

    def close(self) -> None:
        """Ends the server."""
        if hasattr(self, "_server"):
            self._server.terminate()
            self._server.wait()

    def _complete(self, prompt: list[int], length: int) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "n_predict": length,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "return_tokens": True,
        }
        return self._ask("POST", "/completion", body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_REQUEST_SECONDS)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {text[:200]}")
        return json.loads(text)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while True:
            if self._server.poll() is not None or time.monotonic() > give_up:
                self._log.seek(0)
                lines = self._log.read().strip().splitlines()
                self.close()
                raise RuntimeError(f"llama-server did not start: {lines[-1] if lines else 'it said nothing'}")
            try:
                self._ask("GET", "/health")
                return
            except (OSError, RuntimeError):
                time.sleep(0.1)


def server_arguments(settings: Settings, weights: str, port: int) -> list[str]:
    """Returns the server's arguments: `max_slots` sequences, each with room for the longest one.

    Keys and values of 16 bits are f16, llama.cpp's default: with bf16 it took 6% more processor time.
    """
    kv_type = "f32" if settings.dtype == "float32" else "f16"
    return [
        *("--model", weights, "--port", str(port), "--host", "127.0.0.1"),
        *("--parallel", str(settings.max_slots), "--ctx-size", str(settings.max_slots * settings.max_model_len)),
        *("--threads", str(settings.threads), "--threads-batch", str(settings.threads), "--threads-http", "64"),
        *("--cache-type-k", kv_type, "--cache-type-v", kv_type, "--cache-ram", "0"),
        *("--gpu-layers", "0" if settings.platform == "cpu" else "all"),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    driver = LlamaCpp()
    try:
        serve(driver)
    finally:
        driver.close()
