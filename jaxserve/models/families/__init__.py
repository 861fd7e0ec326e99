"""Families of models: what a published config.json says, read into a `ModelConfig` and written back."""

from jaxserve.models.families.hugging_face import from_hugging_face, read_model_config, to_hugging_face

__all__ = ["from_hugging_face", "read_model_config", "to_hugging_face"]
