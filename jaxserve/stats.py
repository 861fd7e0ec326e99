"""Running totals of an engine, and the sentence they are printed as."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Totals since the engine was made, or since `reset_stats`."""

    max_slots: int
    num_pages: int
    num_requests: int = 0  # finished
    num_prompt_tokens: int = 0  # of finished requests
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_slot_steps: int = 0  # slots in use, summed over steps
    num_computed_tokens: int = 0  # rows of the forward pass, recomputation included
    num_preemptions: int = 0
    peak_pages: int = 0  # most pages in use at once
    compile_seconds: float = 0.0  # the first calls of all programs
    busy_seconds: float = 0.0  # spent in `Engine.step`

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of work."""
        return self.num_generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def mean_occupancy(self) -> float:
        """Share of the slots in use, averaged over steps."""
        return self.num_slot_steps / (self.num_steps * self.max_slots) if self.num_steps else 0.0

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.num_requests} requests, {self.num_prompt_tokens} prompt + {self.num_generated_tokens} generated "
            f"tokens, {self.tokens_per_second:.1f} tokens/s, mean slot occupancy {self.mean_occupancy:.0%} of "
            f"{self.max_slots}, peak page use {self.peak_pages}/{self.num_pages}, {self.num_preemptions} preemptions, "
            f"{self.num_steps} steps, compiled in {self.compile_seconds:.1f} s"
        )
