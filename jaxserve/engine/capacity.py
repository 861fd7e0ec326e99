"""Capacities that depend on the machine and the model: the longest sequence, the backend, the number of pages."""

import dataclasses
import logging

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.core.cache import bytes_per_page
from jaxserve.models import ModelConfig
from jaxserve.models.prepare import Params, embedding_of, loaded_dtype
from pallas_kernels.backend import check_runs_here
from pallas_kernels.native import serves_heads

_log = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.9
_TPU_LANES = 128
_POOL_BYTES_UNREPORTED = 1 << 30  # size of the pool where the platform does not report free memory, as on CPU


def resolve_capacities(config: EngineConfig, model: ModelConfig, params: Params) -> EngineConfig:
    """Returns the configuration with a value for every capacity that was left open, and logs what fits.

    `max_model_len` becomes 2048, or what the model was made for if that is less. The backend is the default of the platform
    that the weights are on. Keys and values get the dtype that the weights were loaded in. The pool gets 90% of the memory that
    the weights' device reports as free, or 1 GiB if it reports none; never less than one longest sequence needs, nor more
    than all slots can use.

    Raises:
      ValueError: if `max_model_len` is longer than the model was made for, or the attention backend cannot run on the weights'
        device.
    """
    original = config
    if config.max_model_len is None:
        max_model_len = min(config.max_sequence_len, model.max_position)
        config = dataclasses.replace(config, max_model_len=max_model_len)
    elif config.max_model_len > model.max_position:
        raise ValueError(
            f"max_model_len={config.max_model_len} is longer than the {model.max_position} positions that the model "
            f"was made for: use at most {model.max_position}, or leave it out"
        )
    weight = embedding_of(params)
    kv_dtype = config.kv_dtype or str(loaded_dtype(params))
    config = dataclasses.replace(config, kv_dtype=kv_dtype)
    config = dataclasses.replace(config, attention_backend=_attention_backend(config, model, weight))
    page_bytes = bytes_per_page(model, config.page_size, kv_dtype)
    num_pages = config.num_pages
    if num_pages is None:
        num_useful = config.max_slots * config.pages_per_slot
        num_pages = max(min(_pool_bytes(weight) // page_bytes, num_useful), config.pages_per_slot)
    resolved = dataclasses.replace(config, num_pages=num_pages, tile_rows=config.tile_size)
    check_runs_here(config.backend, interpret=config.interpret_kernels, platform=platform_of(weight))
    if resolved == original:
        return resolved  # nothing was left open
    _log.info(
        "KV pool: %d pages of %d tokens in %s hold %d tokens, %.1f MB; %d slots, %d queue rows, sequences of at most "
        "%d tokens, %d prompt tokens per step, at most %d logprobs and %d stop tokens per request; attention: %s%s",
        num_pages,
        config.page_size,
        kv_dtype,
        num_pages * config.page_size,
        num_pages * page_bytes / 1e6,
        config.max_slots,
        config.queue_size,
        config.max_sequence_len,
        config.chunk_size,
        config.max_logprobs,
        config.max_stop_token_ids,
        resolved.attention_backend,
        ", interpreted" if config.interpret_kernels else "",
    )
    return resolved


def platform_of(array: jax.Array) -> str:
    """Returns the platform of the devices that hold an array: "cpu", "gpu" or "tpu"."""
    return next(iter(array.devices())).platform


def free_bytes(array: jax.Array) -> int | None:
    """Returns how much memory is free on a device that holds an array; None if its platform does not report that."""
    reported = next(iter(array.devices())).memory_stats() or {}
    if "bytes_limit" not in reported:
        return None
    return reported["bytes_limit"] - reported.get("bytes_in_use", 0)


def _attention_backend(config: EngineConfig, model: ModelConfig, weight: jax.Array) -> str:
    """Returns the backend asked for, or the weights' platform's default where that serves the model, else "reference".

    The TPU kernels need a head dimension that is a multiple of the lanes: XLA:TPU lays out other pools differently, and would
    copy a whole pool for every call. Native kernels do not take every dtype and head shape, and run on one device only.
    """
    backend = config.backend_on(platform_of(weight))
    has_no_kernel = {
        "tpu": model.head_dim % _TPU_LANES != 0,
        "native": not serves_heads(model.head_dim, model.group_size)
        or len(weight.sharding.device_set) > 1
        or weight.dtype == jnp.float16,
    }
    if has_no_kernel.get(backend, False):
        if config.attention_backend is None and config.weight_dtype is None:
            return "reference"
        if backend == "native":
            raise ValueError(
                f"the backend 'native' does not serve {weight.dtype} weights on {len(weight.sharding.device_set)} "
                f"devices, head_dim={model.head_dim}, {model.group_size} query heads per kv head: use 'reference'"
                + ("" if config.weight_dtype is None else f", without weight_dtype={config.weight_dtype!r}")
            )
    return backend


def _pool_bytes(weight: jax.Array) -> int:
    free = free_bytes(weight)
    return _POOL_BYTES_UNREPORTED if free is None else int(_SHARE_OF_FREE_MEMORY * free)
