"""Reads everything that an engine needs from a checkpoint."""

import dataclasses

from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import resolve_capacities
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, prepare_and_free
from jaxserve.text.tokenizer import Tokenizer, load_eos_token_ids, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The contents of a checkpoint: parameters prepared for the backend, and the configuration with all capacities chosen."""

    params: Params
    model: ModelConfig
    config: EngineConfig
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]


def load(path_or_id: str, config: EngineConfig, *, dtype: str, load_format: str, seed: int) -> Loaded:
    """Loads a checkpoint in Hugging Face layout; arguments and errors as for `Engine.from_pretrained`."""
    from jaxserve.models import checkpoint, families
    from jaxserve.models import params as weights

    if load_format == "dummy":
        model, tokenizer, eos_token_ids = families.read_model_config(path_or_id), None, ()
        params = weights.random_params(model, seed, dtype)
    elif load_format == "auto":
        directory = checkpoint.resolve_model(path_or_id)
        model = families.read_model_config(directory)
        tokenizer, eos_token_ids = load_tokenizer(directory), tuple(load_eos_token_ids(directory))
        params = checkpoint.load_hugging_face(directory, model, dtype=dtype)
    else:
        raise ValueError(f"load_format={load_format!r} must be auto or dummy")
    resolved = resolve_capacities(config, model, params)
    params = prepare_and_free(params, model, resolved.backend, resolved.weight_dtype)
    return Loaded(params, model, resolved, tokenizer, eos_token_ids)
