"""The driver of vLLM, which runs in this process, without prefix caching, because every round has the same prompts.

On CPUs its manual recommends loading Intel's OpenMP and tcmalloc first; the driver does so if they are installed.
"""

import ctypes.util
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from peers.protocol import Round, Settings, serve


class Vllm:
    """vLLM's `LLM.generate`."""

    def load(self, settings: Settings) -> dict[str, Any]:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        pool: dict[str, Any] = {}
        if settings.platform == "cpu":
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(settings.pool_bytes / 2**30))  # whole GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{settings.threads - 1}")
        else:
            pool["kv_cache_memory_bytes"] = settings.pool_bytes
        import torch
        import vllm  # type: ignore[import-not-found]

        self._llm = vllm.LLM(
            model=settings.model,
            dtype=settings.dtype,
            max_num_seqs=settings.max_slots,
            max_model_len=settings.max_model_len,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=False,  # with True requests would have no times
            **pool,
            **settings.options,
        )
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "preloaded": [pathlib.Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":")],
        }

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        params = [
            SamplingParams(temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False)
            for length in output_lengths
        ]
        start = time.perf_counter()
        results = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        spans = [
            (result.metrics.last_token_ts - result.metrics.first_token_ts) / (length - 1)
            for result, length in zip(results, output_lengths, strict=True)
            if result.metrics is not None and length > 1
        ]
        return Round(seconds, [list(result.outputs[0].token_ids) for result in results], spans or None)


def preloaded() -> list[str]:
    """Returns the installed libraries that make vLLM's CPU build faster."""
    openmp = pathlib.Path(sys.prefix) / "lib" / "libiomp5.so"  # from the package intel-openmp
    return [*filter(None, [ctypes.util.find_library("tcmalloc_minimal")]), *([str(openmp)] if openmp.exists() else [])]


if __name__ == "__main__":
    libraries = preloaded()
    if libraries and "LD_PRELOAD" not in os.environ:
        arguments = [sys.executable, "-m", "peers.vllm_driver"]
        os.execve(sys.executable, arguments, os.environ | {"LD_PRELOAD": ":".join(libraries)})
    serve(Vllm())
