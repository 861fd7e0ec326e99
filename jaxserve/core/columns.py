"""Columns: fields of records whose arrays have one row per sequence, declared with the value that means "not set".

    top_p: Float32[Array, " Q"] = column(off=1, parameter=True)

The annotation gives dtype and shape by its axis letters, the first of which counts the rows; `off` is the value that changes
nothing. With `parameter=True` the column holds the field of `SamplingParams` of the same name, whose rule is its range. From
these declarations rows are made, filled and checked: `off_rows`, `fill_parameters`, `in_range`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxserve.config import EngineConfig
from jaxserve.request import Integer, Number, SamplingParams, parameters_of

T = TypeVar("T")


def column(*, off: float = 0, parameter: bool = False) -> Any:
    """Declares a field of a record; without it, `off` is 0 and the field holds no sampling parameter."""
    return dataclasses.field(metadata={"off": off, "parameter": parameter})


def axis_sizes(vocab_size: int, config: EngineConfig) -> dict[str, int]:
    """Returns the sizes of the axes that rows of the queue have, by the names that stand in annotations."""
    return {
        "M": config.max_sequence_len,
        "Z": config.max_stop_token_ids,
        "NS": config.max_stop_sequences,
        "LS": config.max_stop_sequence_len,
        "NB": config.max_logit_bias,
        "NW": config.max_bad_words,
        "LW": config.max_bad_word_len,
        "V/32": -(-vocab_size // 32),
    }


def off_rows(
    record: type[T], num_rows: int, sizes: Mapping[str, int], full: Callable[..., Any] = jnp.full, **others: Any
) -> T:
    """Returns a record of rows in which nothing is set.

    Args:
      record: its fields are arrays, or records of arrays.
      num_rows: the size of the first axis of every array.
      sizes: the sizes of the other axes by their names; axes may also be numbers.
      full: function that makes an array of a shape, a value and a dtype: `jnp.full` or `np.full`.
      others: the values of fields that are neither arrays nor records of arrays.
    """
    values = dict(others)
    for field in dataclasses.fields(record):  # pyright: ignore[reportArgumentType]
        kind: Any = field.type
        if field.name in others:
            continue
        if hasattr(kind, "dim_str"):  # an array
            axes = kind.dim_str.split()[1:]
            shape = (num_rows, *(int(axis) if axis.isdecimal() else sizes[axis] for axis in axes))
            values[field.name] = full(shape, field.metadata.get("off", 0), kind.dtypes[0])
        else:
            values[field.name] = off_rows(kind, num_rows, sizes, full)
    return record(**values)


@functools.cache
def parameter_rules(record: type) -> Mapping[str, Number | Integer]:
    """Returns the fields of a record that hold a sampling parameter, with the rule of each.

    Raises:
      TypeError: if there is no number of that name in `SamplingParams`, or it may be None.
    """
    rules: dict[str, Number | Integer] = {}
    for field in dataclasses.fields(record):
        if not field.metadata.get("parameter"):
            continue
        declared = parameters_of(SamplingParams).get(field.name)
        if declared is None or declared.default is None or not isinstance(declared.rule, Number | Integer):
            raise TypeError(
                f"{record.__name__}.{field.name} must have the name of a number in SamplingParams, never None"
            )
        rules[field.name] = declared.rule
    return rules


def fill_parameters(rows: Any, index: int, params: SamplingParams) -> None:
    """Writes the sampling parameters that a record of host arrays has columns for into one of its rows."""
    for name in parameter_rules(type(rows)):
        getattr(rows, name)[index] = getattr(params, name)


def in_range(rows: Any) -> Bool[Array, " W"]:
    """Returns whether all sampling parameters of a row lie within their ranges."""
    checks = [rule.includes(getattr(rows, name)) for name, rule in parameter_rules(type(rows)).items()]
    return functools.reduce(operator.and_, checks)
