"""A peer that does no work, run in a process or without one: it counts tokens up, and misbehaves when it is told to."""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from peers.process import PeerError, Usage
from peers.protocol import Round, Settings, answer, serve

PEAKS = {
    "provenance": {"device": "a machine", "platform": "cpu", "seed": 0, "method": "", "jax": "0", "commit": "c"},
    "matmul": {"way": "by hand", "flops_per_s": 1e11},
    "read": {"way": "by eye", "bytes_per_s": 1e10},
}


class Stub:
    def load(self, settings: Settings) -> dict[str, Any]:
        print("libraries print what they like")
        if settings.model == "absent":
            raise ModuleNotFoundError("No module named 'absent'")
        if settings.model == "wrong":
            raise ValueError("the model is wrong\nin many ways")
        return {"versions": {"stub": "1"}, "settings": settings.max_slots}

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        if prompts[0] == [0]:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        if prompts[0] == [1]:
            time.sleep(60)
        tokens = [[*range(length)] for length in output_lengths]
        return Round(float(sum(output_lengths)), tokens, [0.5] * len(prompts), {"prompts": len(prompts)})


class InProcess:
    """A driver that is asked without a process of its own."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.log, self.cpu, self.closed = driver, [], 0.0, False

    def ask(self, message: Any, timeout_s: float) -> dict[str, Any]:
        self.log.append(message)
        reply = json.loads(json.dumps(answer(self.driver, json.loads(json.dumps(message)))))
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def usage(self) -> Usage:
        self.cpu += 1.0
        return Usage(self.cpu, 1000)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


if __name__ == "__main__":
    serve(Stub())
