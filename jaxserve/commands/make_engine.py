"""Makes the engine that the flags of a command line describe."""

import logging
import pathlib

import jax

from jaxserve.commands.flags import EngineOptions
from jaxserve.demo_model import DEMO_MODEL
from jaxserve.engine import Engine
from jaxserve.models import checkpoint


def make_engine(options: EngineOptions) -> Engine:
    """Loads the model and makes the engine that the options describe. Compiled programs are kept on disk from then on.

    Raises:
      ValueError: if the model is missing or not valid.
    """
    logging.getLogger("jax").setLevel(logging.ERROR)
    if options.compilation_cache_dir:
        cache = pathlib.Path(options.compilation_cache_dir).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # dozens of small programs add up
    path = options.model or DEMO_MODEL
    if options.load_format == "auto":
        path = str(checkpoint.resolve_model(path))
    return Engine.from_pretrained(
        path, dtype=options.dtype, config=options.config, load_format=options.load_format, seed=options.seed
    )
