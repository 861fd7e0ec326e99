"""The drivers of transformers: `generate` on static batches, and its continuous batching.

Static batches hold the requests in their order, padded on the left, and run until the longest member ends; tokens beyond a
request's output length do not count. A request's last token counts as delivered in the step that made it.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from peers.protocol import Round, Settings, serve

_PAGE_SIZE = 32


class Static:
    """transformers' `model.generate` on a batch of `max_slots` requests at a time."""

    def load(self, settings: Settings) -> dict[str, Any]:
        self._model, versions = _load(settings)
        self._batch_size = settings.max_slots
        return {"versions": versions}

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        token_ids: list[list[int]] = []
        seconds_per_token: list[float] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), self._batch_size):
            part = slice(first, first + self._batch_size)
            tokens, stamps = self._generate(prompts[part], max(output_lengths[part]))
            for ids, length in zip(tokens, output_lengths[part], strict=True):
                token_ids.append(ids[:length])
                if length > 1:
                    seconds_per_token.append((stamps[length - 1] - stamps[0]) / (length - 1))
        return Round(time.perf_counter() - start, token_ids, seconds_per_token)

    def _generate(self, prompts: Sequence[list[int]], length: int) -> tuple[list[list[int]], list[float]]:
        """Returns the tokens for each prompt, and when each step ended."""
        import torch

        stamps: list[float] = []

        def note(input_ids: Any, scores: Any, **_: Any) -> Any:
            stamps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=length,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[note],
            )
        return output[:, width:].tolist(), stamps


class Continuous:
    """The manager behind transformers' `model.generate_batch`, with each request's output length; it stays between rounds."""

    def load(self, settings: Settings) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._model, versions = _load(settings)
        self._generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        self._config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=settings.max_slots * -(-settings.max_model_len // _PAGE_SIZE),
            max_batch_tokens=settings.max_slots + settings.chunk_size,
            max_requests_per_batch=settings.max_slots,
            allow_block_sharing=False,
        )
        return {"versions": versions, "page_size": _PAGE_SIZE}

    def run(self, prompts: Sequence[list[int]], output_lengths: Sequence[int]) -> Round:
        import torch

        with (
            torch.inference_mode(),
            self._model.continuous_batching_context_manager(
                self._generation, continuous_batching_config=self._config, persistent_manager=True
            ) as manager,
        ):
            start = time.perf_counter()
            for index, (prompt, length) in enumerate(zip(prompts, output_lengths, strict=True)):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length, record_timestamps=True)
            results: dict[int, Any] = {}
            while len(results) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    results[int(result.request_id)] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("the generation loop ended before all requests did")
            seconds = time.perf_counter() - start
        ordered = [results[index] for index in range(len(prompts))]
        stamps = [result.timestamps for result in ordered if len(result.timestamps or ()) > 1]
        spans = [(times[-1] - times[0]) / (len(times) - 1) for times in stamps]
        return Round(seconds, [list(result.generated_tokens) for result in ordered], spans or None)


def _load(settings: Settings) -> tuple[Any, dict[str, str]]:
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
    )
    model = model.to("cuda" if settings.platform == "gpu" else "cpu").eval()
    return model, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(Continuous() if sys.argv[1:] == ["continuous"] else Static())
