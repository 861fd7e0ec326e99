"""From a Hugging Face config.json to a `ModelConfig`, and back.

A field that changes the computation is either honoured or refused by name. The config.json of a checkpoint has many other
fields, which are ignored; in a file of `configs/models/` (`strict`) an unknown key is an error.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.families import llama
from jaxserve.models.families.family import Family
from jaxserve.models.families.fields import FLAG, NAME, NON_NEGATIVE, SIZE, read, require
from jaxserve.models.families.keys import refuse_unknown_keys, refuse_what_is_not_supported
from jaxserve.models.families.rope_blocks import read_rope, write_rope

FAMILIES: dict[str, Family] = {**llama.FAMILIES}


def from_hugging_face(mapping: Mapping[str, Any], *, strict: bool = False) -> ModelConfig:
    """Returns the model that the contents of a Hugging Face config.json describe.

    Args:
      mapping: the parsed JSON object, as transformers 4 or 5 writes it.
      strict: whether a key that has no meaning here is an error.

    Raises:
      ValueError: if the model is not supported, or a field is missing, unknown (`strict`) or of the wrong type.
    """
    name = require(mapping, "model_type", NAME)
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    refuse_what_is_not_supported(mapping, family)
    if strict:
        refuse_unknown_keys(mapping)
    num_layers, num_heads = (
        require(mapping, "num_hidden_layers", SIZE),
        require(mapping, "num_attention_heads", SIZE),
    )
    max_position = read(mapping, "max_position_embeddings", SIZE) or family.max_position
    eps = read(mapping, "rms_norm_eps", NON_NEGATIVE, default=1e-6)
    biases = _read_biases(mapping, family)
    return ModelConfig(
        family=name,
        vocab_size=require(mapping, "vocab_size", SIZE),
        embed_dim=require(mapping, "hidden_size", SIZE),
        ffw_dim=require(mapping, "intermediate_size", SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read(mapping, "num_key_value_heads", SIZE, default=family.num_kv_heads) or num_heads,
        head_dim=read(mapping, "head_dim", SIZE, default=family.head_dim) or _default_head_dim(mapping, num_heads),
        norm_eps=1e-6 if eps is None else float(eps),
        rope=read_rope(mapping, max_position),
        windows=family.windows.read(mapping, num_layers),
        tied_embeddings=bool(read(mapping, "tie_word_embeddings", FLAG)),
        qk_norm=family.qk_norm,
        max_position=max_position,
        **biases,
    )


def _default_head_dim(mapping: Mapping[str, Any], num_heads: int) -> int:
    hidden = require(mapping, "hidden_size", SIZE)
    if hidden % num_heads:
        raise ValueError(f"hidden_size={hidden} is no multiple of num_attention_heads={num_heads}: give head_dim")
    return hidden // num_heads


def _read_biases(mapping: Mapping[str, Any], family: Family) -> dict[str, bool]:
    name = mapping["model_type"]
    attention, ffw = read(mapping, "attention_bias", FLAG), read(mapping, "mlp_bias", FLAG)
    fixed = {"never": False, "qkv": True}.get(family.attention_bias)
    if fixed is not None and attention not in (None, fixed):
        raise ValueError(f"attention_bias={attention} is not supported for model_type {name!r}: it is always {fixed}")
    if ffw and not family.mlp_bias:
        raise ValueError(f"mlp_bias={ffw} is not supported for model_type {name!r}: it is always False")
    qkv = bool(attention) if fixed is None else fixed
    return {"qkv_bias": qkv, "out_bias": qkv and family.attention_bias == "field", "ffw_bias": bool(ffw)}


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns contents of a config.json that transformers 4 and 5 load, and that `from_hugging_face` reads as `config`.

    Raises:
      ValueError: if `config` has parts that checkpoints of its family cannot express.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    mapping: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tied_embeddings,
        **write_rope(config.rope),
    }
    if family.attention_bias == "field":
        mapping["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        mapping["mlp_bias"] = config.ffw_bias
    mapping |= family.windows.write(config)
    if from_hugging_face(mapping, strict=True) != config:
        raise ValueError(
            f"a checkpoint of family {config.family!r} cannot express this model's biases, q and k norms, windows or "
            f"rotary embedding: choose the family that has them, or save with save_orbax ({config})"
        )
    return mapping


def read_model_config(path: str | pathlib.Path, *, strict: bool = False) -> ModelConfig:
    """Returns the model that a config.json describes.

    Args:
      path: the file, or a directory with a `config.json`.
      strict: whether a key that has no meaning here is an error.

    Raises:
      ValueError: if the file is missing, not JSON, or refused by `from_hugging_face`; the message names the file.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        mapping = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist: give a Hugging Face config.json, or the directory of a checkpoint that holds one"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it or download it again") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{file} holds a JSON {type(mapping).__name__}: it must be an object of model settings")
    try:
        return from_hugging_face(mapping, strict=strict)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
