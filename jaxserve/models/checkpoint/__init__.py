"""Checkpoints: Hugging Face layout in safetensors files, and Orbax. Pickles are never read."""

from jaxserve.models.checkpoint.hub import resolve_model
from jaxserve.models.checkpoint.hugging_face import load_hugging_face, save_hugging_face
from jaxserve.models.checkpoint.orbax import load_orbax, save_orbax
from jaxserve.models.checkpoint.tensor_files import CheckpointError

__all__ = ["CheckpointError", "load_hugging_face", "load_orbax", "resolve_model", "save_hugging_face", "save_orbax"]
