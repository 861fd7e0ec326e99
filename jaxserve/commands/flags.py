"""The flags that several command lines have, in groups with a readable help, and the records that they are turned into.

Importing this module defines no flag: a command line calls `define_engine_flags` and `define_sampling_flags` itself. Each flag
is filed under the name of its group, where absl expects the name of a module, so that `--helpfull` shows the groups too. The
flag of a record's field has the name of the field, and is None if it is not given.
"""

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from jaxserve.config import ENGINE, EngineConfig, read_json_object
from jaxserve.request import (
    DRAW,
    LOGITS,
    PROMPTS,
    REPORT,
    STOP,
    Biases,
    Choice,
    Integer,
    Number,
    SamplingParams,
    Switch,
    TokenIds,
    default_text,
    parameters_of,
)

DTYPES = ("bfloat16", "float32", "float16")
MODEL = "Model"

GROUPS = (PROMPTS, MODEL, LOGITS, DRAW, STOP, REPORT, ENGINE)  # in the order of --help

_METAVARS = {
    "prompts_file": "FILE",
    "output": "FILE",
    "timeline": "FILE",
    "config": "FILE",
    "model": "DIR",
    "compilation_cache_dir": "DIR",
    **{name: "ID,..." for name, item in parameters_of(SamplingParams).items() if isinstance(item.rule, TokenIds)},
    **{name: "ID:BIAS,..." for name, item in parameters_of(SamplingParams).items() if isinstance(item.rule, Biases)},
    "int": "INT",
    "float": "FLOAT",
    "string": "TEXT",
    "multi string": "TEXT",
}
_WIDTH = 100
_TEXT_COLUMN = 36


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The values of the flags that describe an engine."""

    model: str | None  # a directory or a hub id; None: the demo model
    load_format: str
    dtype: str
    compilation_cache_dir: str  # empty: compiled programs are not kept
    seed: int
    config: EngineConfig


def define_engine_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """Defines the flags that `engine_options` reads: the model, and a flag per field of EngineConfig.

    Args:
      values: receives the flags.
      defaults: defaults by field that the help shows in place of the record's own.
    """
    to: dict[str, Any] = {"flag_values": values, "module_name": MODEL}
    flags.DEFINE_string(
        "model", None, "A checkpoint directory or a Hugging Face hub id; by default the demo model.", **to
    )
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "The dtype of the weights.", **to)
    flags.DEFINE_enum(
        "load_format",
        "auto",
        ["auto", "dummy"],
        "With dummy, --model is a config.json file and the weights are random.",
        **to,
    )
    to["module_name"] = ENGINE
    flags.DEFINE_string("config", None, "A JSON file with values for the flags below; flags override it.", **to)
    flags.DEFINE_integer(
        "engine_seed", 0, "The seed from which the engine derives the seeds of requests that have none.", **to
    )
    flags.DEFINE_string(
        "compilation_cache_dir",
        "~/.cache/jaxserve/compiled",
        "The directory for compiled programs; if it is empty, they are not kept.",
        **to,
    )
    _define_fields(EngineConfig, defaults, values)


def define_timeline_flag(values: flags.FlagValues) -> None:
    """Defines the flag whose value `jaxserve.timeline.recording` takes."""
    flags.DEFINE_string(
        "timeline",
        None,
        "A file (.html or .png) for a picture of what each slot did in each step.",
        flag_values=values,
        module_name=PROMPTS,
    )


def define_sampling_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """Defines a flag per field of SamplingParams; `defaults` as for `define_engine_flags`."""
    _define_fields(SamplingParams, defaults, values)


def _define_fields(record: type, defaults: Mapping[str, Any], values: flags.FlagValues) -> None:
    """Defines a flag per field of a record, as the field's declaration says."""
    for name, item in parameters_of(record).items():
        text = item.description + default_text(defaults.get(name, item.default))
        to: dict[str, Any] = {"flag_values": values, "module_name": item.group}
        match item.rule:
            case Number():
                flags.DEFINE_float(name, None, text, **to)
            case Switch():
                flags.DEFINE_boolean(name, None, text, **to)
            case Choice(choices) if all(isinstance(choice, str) for choice in choices):
                flags.DEFINE_enum(name, None, [str(choice) for choice in choices], text, **to)
            case Integer() | Choice():
                flags.DEFINE_integer(name, None, text, **to)
            case _:
                flags.DEFINE_multi_string(name, None, text, **to)


def sampling_params(values: flags.FlagValues, **defaults: Any) -> SamplingParams:
    """Returns the sampling parameters that the flags set; `defaults` replace the record's defaults for flags that are not set.

    Raises:
      ValueError: if a value is not valid.
    """
    fields = _flags_set(values, SamplingParams)
    for name, item in parameters_of(SamplingParams).items():
        if name in fields and isinstance(item.rule, TokenIds):
            fields[name] = [_token_id(name, part) for part in _parts(fields[name])]
        elif name in fields and isinstance(item.rule, Biases):
            fields[name] = [_bias(name, part) for part in _parts(fields[name])]
    return SamplingParams.from_dict(defaults | fields)


def engine_options(values: flags.FlagValues, **defaults: Any) -> EngineOptions:
    """Returns the options of an engine, from flags and the file that --config names; `defaults` as for `sampling_params`.

    Raises:
      ValueError: if the file or a flag is not valid.
    """
    if not 0 <= values.engine_seed < 2**64:
        raise ValueError(f"--engine_seed={values.engine_seed} must lie in [0, 2^64)")
    fields = read_json_object(values.config, "engine config") if values.config is not None else {}
    return EngineOptions(
        model=values.model,
        load_format=values.load_format,
        dtype=values.dtype,
        compilation_cache_dir=values.compilation_cache_dir,
        seed=values.engine_seed,
        config=EngineConfig.from_dict(defaults | fields | _flags_set(values, EngineConfig)),
    )


def parse_flags(arguments: Sequence[str], values: flags.FlagValues, help_text: Callable[[], str]) -> list[str]:
    """Parses flags; returns the arguments that are no flags. Made for `app.run(flags_parser=...)`.

    --help and -h print `help_text()` and exit with status 0. A flag that is not valid prints one sentence and exits with
    status 1.
    """
    for name, short_name in (("help", "h"), ("helpshort", "?")):
        flags.DEFINE_flag(_HelpFlag(name, short_name, help_text), values)
    try:
        return values(arguments)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
        sys.exit(1)


def describe_flags(values: flags.FlagValues, groups: Sequence[str] = GROUPS) -> str:
    """Returns a readable list of the flags in these groups, with meanings and defaults; groups without flags are skipped."""
    by_group = values.flags_by_module_dict()
    return "\n\n".join("\n".join([group, *map(_describe, by_group[group])]) for group in groups if group in by_group)


class _HelpFlag(flags.BooleanFlag):
    """A help flag that replaces the one of absl."""

    def __init__(self, name: str, short_name: str, help_text: Callable[[], str]) -> None:
        super().__init__(name, False, "Show this help.", short_name=short_name, allow_override=True)
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
        text = text.removeprefix(f"<{value[1:]}>: ")  # absl puts the accepted values there
    elif kind.startswith("multi"):
        text = text.partition(";\n")[0] + " Repeatable."  # in place of absl's sentence
    name = f"  --[no]{flag.name}" if kind == "bool" else f"  --{flag.name}{value}"
    if flag.default not in (None, []):
        text += default_text(flag.default)
    return _two_columns(name, text.replace("(default: ", "(default:\u00a0")).replace("\u00a0", " ")


def _two_columns(name: str, text: str) -> str:
    indent = " " * _TEXT_COLUMN
    lines = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) + 2 > _TEXT_COLUMN:
        return "\n".join([name, *lines])
    return "\n".join([name.ljust(_TEXT_COLUMN) + lines[0][_TEXT_COLUMN:], *lines[1:]])


def _flags_set(values: flags.FlagValues, record: type) -> dict[str, Any]:
    """Returns the values of those flags of a record's fields that were set."""
    names = [name for name in parameters_of(record) if name in values]
    return {name: values[name].value for name in names if values[name].value is not None}


def _parts(values: Sequence[str]) -> list[str]:
    return ",".join(values).split(",")


def _token_id(name: str, part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(f"--{name}: {part!r} must be a token id, as in --{name}=1,2") from None


def _bias(name: str, part: str) -> tuple[int, float]:
    token, _, bias = part.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ValueError(f"--{name}: {part!r} must be a token id and a number, as in --{name}=50:-1.5") from None
