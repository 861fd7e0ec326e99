"""The description of a family of models: the facts that a `model_type` implies, and the rules that read its own fields."""

import dataclasses

from jaxserve.models.families.windows import WindowRule


@dataclasses.dataclass(frozen=True)
class Family:
    """The facts that a `model_type` implies. Defaults are those of the transformers class.

    A new family is one more of these, in a file for its group; a field that no family had before gets a rule of its own, as
    sliding windows have.

    Attributes:
      architecture: name of the transformers class with the language model head.
      attention_bias: whether attention projections have a bias: "never", "qkv" (always, but not the output projection) or
        "field" (what the field `attention_bias` says).
      mlp_bias: whether the field `mlp_bias` is honoured.
      windows: reads and writes the fields of sliding windows.
      qk_norm: whether queries and keys are normalised.
      num_kv_heads: default of `num_key_value_heads`; None: as many as query heads.
      head_dim: default of `head_dim`; None: hidden_size / num_attention_heads.
      max_position: default of `max_position_embeddings`.
    """

    architecture: str
    attention_bias: str
    mlp_bias: bool
    windows: WindowRule
    qk_norm: bool
    num_kv_heads: int | None
    head_dim: int | None
    max_position: int
