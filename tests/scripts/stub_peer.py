"""A peer that does no work, to be run by `peer_process.py`: it counts tokens up, and misbehaves when it is told to."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from peers.protocol import Round, Settings, serve


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


if __name__ == "__main__":
    serve(Stub())
