"""Named shapes of attention that tests, benchmarks and the compile gate share: the heads of real models."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The static properties of the attention of one layer.

    Attributes:
      name: unique.
      num_heads: H.
      num_kv_heads: K.
      head_dim: D.
      page_size: T, tokens per page.
      window: how many of the latest positions a batch row sees, its own included; None: all.
      softcap: bound of the scores; None: no bound.
      sinks: whether every head has a sink.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def group_size(self) -> int:
        """G, the query heads per kv head."""
        return self.num_heads // self.num_kv_heads


SHAPES = {
    shape.name: shape
    for shape in (
        AttentionShape("llama3-8b", 32, 8, 128),
        AttentionShape("llama3-8b-page16", 32, 8, 128, page_size=16),
        AttentionShape("llama3-8b-page128", 32, 8, 128, page_size=128),
        AttentionShape("llama-135m", 9, 3, 64, page_size=32),
        AttentionShape("qwen3-0.6b", 16, 8, 128),
        AttentionShape("qwen2-0.5b", 14, 2, 64, page_size=16),
        AttentionShape("mistral-7b-window", 32, 8, 128, page_size=32, window=100),
        AttentionShape("phi-2", 32, 32, 80),
        AttentionShape("gemma2-2b", 8, 4, 256, window=150, softcap=50.0),
        AttentionShape("gpt-oss-20b", 64, 8, 64, window=128, sinks=True),
        AttentionShape("multi-query", 16, 1, 128, page_size=128),
    )
}
