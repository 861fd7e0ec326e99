"""What the command lines share: flags in groups with a readable help, turned at once into records.

Nothing is defined on import: a command line calls `define_engine_flags` and `define_sampling_flags` itself. The name of a
group stands where absl expects that of the module which defines a flag, so `--helpfull` has the groups too. The flag of a
record's field has the field's name, and is None where it was not given.
"""

import dataclasses
import logging
import pathlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from jaxserve.config import KV_DTYPES, WEIGHT_DTYPES, EngineConfig, read_json_object
from jaxserve.demo_model import DEMO_MODEL
from jaxserve.request import SamplingParams
from pallas_kernels.backend import BACKENDS

DTYPES = ("bfloat16", "float32", "float16")
PROMPTS = "Prompts and output"
MODEL = "Model"
ENGINE = "Engine"

_ENGINE_FIELDS = {
    "max_slots": "Sequences that run at the same time.",
    "num_pages": "Pages in the KV pool; by default as many as fit.",
    "page_size": "Tokens per page; a power of two from 8 to 256.",
    "max_model_len": "Longest sequence, prompt and output; by default 2048, or what the model was made for.",
    "chunk_size": "Most prompt tokens that one step prefills, over all sequences.",
    "max_queue": "Rows for waiting, running and finished sequences on the device; by default 4 per slot.",
    "max_waiting": "Most requests that wait on the host; more are refused.",
    "max_logprobs": "Most tokens that a request may ask logprobs for.",
    "max_stop_token_ids": "Most token ids that end one sequence, end-of-sequence ids included.",
    "max_stop_sequences": "Most sequences of token ids that end one sequence.",
    "max_stop_sequence_len": "Most tokens in one of them.",
    "max_logit_bias": "Most token ids with a bias per request.",
    "max_bad_words": "Most bad words per request; each way to spell one counts.",
    "max_bad_word_len": "Most tokens in one of them.",
    "penalties": "Whether requests may have penalties; costs 4 bytes per slot and token of the vocabulary.",
    "tile_rows": "Rows that go through the model at once; by default 32, or on accelerators as many as slots.",
    "max_steps_per_call": "Most steps between two looks of the host.",
    "deterministic": "Bitwise independence of a request from its neighbours.",
    "debug_checks": "Check the invariants of the state after every call; slow.",
    "kv_dtype": "Of keys and values; by default that of the weights as they are loaded.",
    "weight_dtype": "int8: weights rounded to 8 bits after loading, on the backend native; by default they are kept.",
    "attention_backend": "What attends to pages; by default triton on NVIDIA GPUs, tpu on TPUs, native on CPUs.",
    "interpret_kernels": "Run the kernels of triton or tpu in an interpreter, on any device; very slow.",
}

_SAMPLING_FIELDS = {
    PROMPTS: {
        "truncate_prompt_tokens": "Use only that many last tokens of a prompt; -1: as many as there is room for.",
    },
    "What changes the logits": {
        "allowed_token_ids": "Only these are drawn; by default all.",
        "bad_words": "A text that is never completed.",
        "min_tokens": "No stop before that many.",
        "logit_bias": "Is added to a token's logit; clamped to [-100, 100].",
        "repetition_penalty": "Above 0; above 1 makes tokens of prompt and output less likely.",
        "frequency_penalty": "In [-2, 2]; subtracted for each time that the token was generated.",
        "presence_penalty": "In [-2, 2]; subtracted if the token was generated.",
    },
    "How a token is drawn": {
        "temperature": "In [0, 2]; 0 takes the most likely token.",
        "min_p": "In [0, 1]; drop tokens less likely than this times the most likely one.",
        "top_k": "Keep the k most likely tokens; 0: all.",
        "top_p": "In (0, 1]; keep the most likely tokens that together reach this probability.",
        "seed": "Of every request: the same seed, the same tokens; by default each has its own.",
        "n": "Samples per prompt.",
    },
    "When it stops": {
        "ignore_eos": "Go on after an end-of-sequence token.",
        "stop_token_ids": "Token ids that end a sequence.",
        "stop": "A text that ends a sequence and is cut off.",
        "include_stop_str_in_output": "Leave the text that ended it in.",
        "max_tokens": "Tokens to generate at most.",
    },
    "What is reported": {
        "logprobs": "Log probabilities: of this many most likely tokens beside the generated one.",
        "logprobs_mode": "Of the model's distribution, or of the one that is drawn from.",
        "prompt_logprobs": "The same for the tokens of the prompt.",
        "detokenize": "Turn tokens into text.",
        "skip_special_tokens": "Leave special tokens out of the text.",
        "spaces_between_special_tokens": "Let the decoder put what it wants between special tokens.",
    },
}

GROUPS = (*dict.fromkeys((PROMPTS, MODEL, *_SAMPLING_FIELDS)), ENGINE)  # as --help has them

_CHOICES = {
    "attention_backend": BACKENDS,
    "kv_dtype": KV_DTYPES,
    "weight_dtype": WEIGHT_DTYPES,
    "logprobs_mode": ("raw", "processed"),
}
_METAVARS = {
    "prompts_file": "FILE",
    "output": "FILE",
    "timeline": "FILE",
    "config": "FILE",
    "model": "DIR",
    "compilation_cache_dir": "DIR",
    "stop_token_ids": "ID,...",
    "allowed_token_ids": "ID,...",
    "logit_bias": "ID:BIAS,...",
    "int": "INT",
    "float": "FLOAT",
    "string": "TEXT",
    "multi string": "TEXT",
}
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean, str: flags.DEFINE_string}
_WIDTH = 100
_TEXT_COLUMN = 36


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The flags that describe an engine."""

    model: str | None  # directory or hub id; None: the demo model
    load_format: str
    dtype: str
    compilation_cache_dir: str  # empty: none
    seed: int
    config: EngineConfig


def define_engine_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """Flags that `engine_options` reads: the model, and a flag per field of EngineConfig.

    `defaults` are those that the help shows where they are not the field's own.
    """
    to: dict[str, Any] = {"flag_values": values, "module_name": MODEL}
    flags.DEFINE_string("model", None, "Checkpoint directory, or Hugging Face hub id; by default the demo model.", **to)
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the weights.", **to)
    flags.DEFINE_enum("load_format", "auto", ["auto", "dummy"], "dummy: random weights for a config.json file.", **to)
    to["module_name"] = ENGINE
    flags.DEFINE_string("config", None, "A JSON file of the fields below; flags override it.", **to)
    flags.DEFINE_integer("engine_seed", 0, "What the seeds of requests without one are derived from.", **to)
    flags.DEFINE_string(
        "compilation_cache_dir", "~/.cache/jaxserve/compiled", "Keeps compiled programs; empty: do not.", **to
    )
    _define_fields(EngineConfig, _ENGINE_FIELDS, defaults, to)


def define_timeline_flag(values: flags.FlagValues) -> None:
    """The flag that `jaxserve.timeline.record.recording` takes."""
    flags.DEFINE_string(
        "timeline",
        None,
        "Draw what each slot did in each step into this file, .html or .png.",
        flag_values=values,
        module_name=PROMPTS,
    )


def define_sampling_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """A flag per field of SamplingParams; `defaults` are those that the help shows where they are not the field's own."""
    for group, texts in _SAMPLING_FIELDS.items():
        _define_fields(SamplingParams, texts, defaults, {"flag_values": values, "module_name": group})


def _define_fields(record: type, texts: Mapping[str, str], defaults: Mapping[str, Any], to: dict[str, Any]) -> None:
    hints = typing.get_type_hints(record)
    for name, text in texts.items():
        text += _default_text(defaults.get(name, getattr(record, name)))
        kind = _field_type(hints[name])
        if name in _CHOICES:
            flags.DEFINE_enum(name, None, list(_CHOICES[name]), text, **to)
        elif kind is None:
            flags.DEFINE_multi_string(name, None, text, **to)
        else:
            _DEFINE[kind](name, None, text, **to)


def _field_type(hint: Any) -> Any:
    """The scalar type of a field, optional or not; None: a field of several values."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    scalars = [option for option in options if option in _DEFINE]
    return scalars[0] if scalars else None


def _default_text(value: Any) -> str:
    if value is None or value == ():
        return ""
    return f" (default: {('no', 'yes')[value] if isinstance(value, bool) else value})"


def sampling_params(values: flags.FlagValues, **defaults: Any) -> SamplingParams:
    """Sampling parameters from flags; `defaults` where one was not given and the field's own is not wanted.

    Raises:
      ValueError: if one is out of range.
    """
    given = _given(values, [field.name for field in dataclasses.fields(SamplingParams)])
    for name in ("allowed_token_ids", "stop_token_ids"):
        if name in given:
            given[name] = [_token_id(name, part) for part in _parts(given[name])]
    if "logit_bias" in given:
        given["logit_bias"] = [_bias(part) for part in _parts(given["logit_bias"])]
    return SamplingParams.from_dict(defaults | given)


def engine_options(values: flags.FlagValues, **defaults: Any) -> EngineOptions:
    """What describes an engine, from flags and from the file that `--config` names; `defaults` as in `sampling_params`.

    Raises:
      ValueError: if that file or a flag is not valid.
    """
    if not 0 <= values.engine_seed < 2**64:
        raise ValueError(f"--engine_seed={values.engine_seed} must lie in [0, 2^64)")
    fields = read_json_object(values.config, "engine config") if values.config is not None else {}
    given = _given(values, [field.name for field in dataclasses.fields(EngineConfig)])
    return EngineOptions(
        model=values.model,
        load_format=values.load_format,
        dtype=values.dtype,
        compilation_cache_dir=values.compilation_cache_dir,
        seed=values.engine_seed,
        config=EngineConfig.from_dict(defaults | fields | given),
    )


def make_engine(options: EngineOptions) -> Any:
    """The engine that the options describe.

    Raises:
      ValueError: if the model is not there or not valid.
    """
    import jax

    from jaxserve.engine.engine import Engine
    from jaxserve.models import checkpoint

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


def parse_flags(arguments: Sequence[str], values: flags.FlagValues, help_text: Callable[[], str]) -> list[str]:
    """What is left of the arguments once the flags are parsed; for `app.run(flags_parser=...)`.

    --help and -h print `help_text()` and exit with status 0; a flag that is not valid gets a sentence and status 1.
    """
    for name, short_name in (("help", "h"), ("helpshort", "?")):
        flags.DEFINE_flag(_HelpFlag(name, short_name, help_text), values)
    try:
        return values(arguments)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
        sys.exit(1)


def describe_flags(values: flags.FlagValues, groups: Sequence[str] = GROUPS) -> str:
    """The flags of these groups, of those that there are, with their meanings and defaults, for people."""
    by_group = values.flags_by_module_dict()
    return "\n\n".join("\n".join([group, *map(_describe, by_group[group])]) for group in groups if group in by_group)


class _HelpFlag(flags.BooleanFlag):
    """Takes the place of absl's flag of the same name."""

    def __init__(self, name: str, short_name: str, help_text: Callable[[], str]) -> None:
        super().__init__(name, False, "show this help", short_name=short_name, allow_override=True)
        self._help_text = help_text

    def parse(self, argument: Any) -> None:
        super().parse(argument)
        if self.value:
            print(self._help_text())
            sys.exit(0)


def _describe(flag: flags.Flag) -> str:
    kind, text = flag.flag_type(), flag.help or ""
    value = f"={_METAVARS.get(flag.name) or _METAVARS.get(kind, '')}"
    if isinstance(flag, flags.EnumFlag):
        value = f"={'|'.join(flag.parser.enum_values)}"
        text = text.removeprefix(f"<{value[1:]}>: ")  # absl's
    elif kind.startswith("multi"):
        text = text.partition(";\n")[0] + " Repeatable."  # in place of absl's sentence
    name = f"  --[no]{flag.name}" if kind == "bool" else f"  --{flag.name}{value}"
    if flag.default not in (None, []):
        text += _default_text(flag.default)
    return _two_columns(name, text.replace("(default: ", "(default:\u00a0")).replace("\u00a0", " ")


def _two_columns(name: str, text: str) -> str:
    indent = " " * _TEXT_COLUMN
    lines = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) + 2 > _TEXT_COLUMN:
        return "\n".join([name, *lines])
    return "\n".join([name.ljust(_TEXT_COLUMN) + lines[0][_TEXT_COLUMN:], *lines[1:]])


def _given(values: flags.FlagValues, names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name].value for name in names if name in values and values[name].value is not None}


def _parts(given: Sequence[str]) -> list[str]:
    return ",".join(given).split(",")


def _token_id(name: str, part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(f"--{name}: {part!r} must be a token id, as in --{name}=1,2") from None


def _bias(part: str) -> tuple[int, float]:
    token, _, amount = part.partition(":")
    try:
        return int(token), float(amount)
    except ValueError:
        raise ValueError(
            f"--logit_bias: {part!r} must be a token id and a number, as in --logit_bias=50:-1.5"
        ) from None
