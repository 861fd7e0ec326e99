"""The static description of a model: the shapes of its weights, and which optional parts it has."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding frequencies (Su et al., 2021) and how they are stretched to longer contexts.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      kind: "default", "linear" (position interpolation, Chen et al., 2023), "llama3" (Llama 3.1's smoothed
        interpolation) or "yarn" (Peng et al., 2023).
      factor: how much longer the stretched context is.
      original_max_position: context length, in tokens, before stretching ("llama3", "yarn").
      low_freq_factor, high_freq_factor: "llama3": wavelengths between original / high and original / low are blended.
      beta_fast, beta_slow: "yarn": rotations over the original context between which frequencies are blended.
      attention_factor: "yarn": multiplies cos and sin; None derives it from `factor` (0.1 ln(factor) + 1).
      mscale, mscale_all_dim: "yarn": alternative derivation of the attention factor; 0 when unused.
      truncate: "yarn": whether the blended range of dimensions is rounded to whole dimensions.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a decoder-only transformer. Hashable, so it can be a static argument of a jitted function.

    Attributes:
      family: Hugging Face `model_type` ("llama", "mistral", "qwen2", "qwen3"); it names the layout of checkpoints.
      vocab_size: V, rows of the embedding.
      embed_dim: E, width of the residual stream.
      ffw_dim: F, width of the gated feed-forward layer.
      num_layers: L.
      num_heads: H, query heads; a multiple of num_kv_heads.
      num_kv_heads: K.
      head_dim: D, even.
      norm_eps: added to the mean square in RMSNorm.
      rope: rotary embedding.
      windows: per layer, the number of latest positions that a query sees, its own included; None: all.
      tied_embeddings: whether the output projection is the embedding.
      qkv_bias, out_bias, ffw_bias: which projections have a bias.
      qk_norm: whether queries and keys are normalised per head (Qwen3).
      max_position: the longest context that the model was made for, in tokens.
    """

    family: str
    vocab_size: int
    embed_dim: int
    ffw_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    windows: tuple[int | None, ...] = ()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffw_bias: bool = False
    qk_norm: bool = False
    max_position: int = 2048

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries but num_layers is {self.num_layers}: give one per layer"
            )
        for name in ("vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of dimensions")

    @property
    def group_size(self) -> int:
        """The number of query heads per kv head."""
        return self.num_heads // self.num_kv_heads
