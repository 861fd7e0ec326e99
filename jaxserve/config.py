"""The static configuration of an engine: every capacity that fixes the shape of an array."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Capacities and choices fixed when the programs are compiled; hashable, so a static argument."""

    max_slots: int = 32
    num_pages: int | None = None
    page_size: int = 16
    max_model_len: int = 2048
    chunk_size: int = 256
    max_queue: int | None = None
    max_logprobs: int = 20
    max_stop_token_ids: int = 8
    tile_rows: int = 32
    max_steps_per_call: int = 32
    deterministic: bool = True
    debug_checks: bool = False
    kv_dtype: str | None = None

    @property
    def pages_per_slot(self) -> int:
        """P: pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)

    @property
    def num_rows(self) -> int:
        """Q: queue rows in the state."""
        return self.max_queue if self.max_queue is not None else 4 * self.max_slots

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Rows per tile of the forward pass, widest first."""
        return (self.tile_rows,) if self.deterministic else (4 * self.tile_rows, self.tile_rows)

    @property
    def max_rows(self) -> int:
        """B: rows of one step, a multiple of every tile size."""
        return -(-(self.max_slots + self.chunk_size) // self.tile_rows) * self.tile_rows
