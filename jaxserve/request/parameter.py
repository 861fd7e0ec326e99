"""Parameters: the fields of a frozen dataclass which say themselves what they accept and what they mean.

    @documented
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        '''What can be chosen.'''

        size: int = parameter(3, Integer(1), "Sizes", "How much there is.")

        def __post_init__(self) -> None:
            check_fields(self)

Everything that lists the fields is made from these declarations: the checks, the text of `help(Options)`, the flags of the
command lines and the table in the documentation. To a type checker the fields are plain ones with a default.
"""

import dataclasses
import difflib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxserve.request.rules import Rule

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The declaration of one field."""

    name: str
    default: Any
    rule: Rule  # the values that it accepts
    group: str  # heading under which lists show it
    meaning: str  # one or two sentences

    @property
    def description(self) -> str:
        """The meaning and the range."""
        return f"{self.meaning} {self.rule.range}".rstrip()


def parameter(default: Any, rule: Rule, group: str, meaning: str) -> Any:
    """Declares a field of a dataclass; the arguments are the fields of `Parameter`."""
    return dataclasses.field(default=default, metadata={"rule": rule, "group": group, "meaning": meaning})


@functools.cache
def parameters_of(record: type) -> Mapping[str, Parameter]:
    """Returns the declarations of a dataclass's fields by name, in their order. Every field must have been declared."""
    return {
        field.name: Parameter(name=field.name, default=field.default, **field.metadata)
        for field in dataclasses.fields(record)
    }


def by_group(record: type) -> dict[str, list[Parameter]]:
    """Returns the declarations of a dataclass's fields under their groups, both in their order."""
    groups: dict[str, list[Parameter]] = {}
    for item in parameters_of(record).values():
        groups.setdefault(item.group, []).append(item)
    return groups


def check_fields(instance: Any) -> None:
    """Checks each field of a frozen dataclass by its rule and stores what the rule returns; for `__post_init__`.

    Raises:
      ValueError: naming the field, its value and the rule.
    """
    for name, item in parameters_of(type(instance)).items():
        object.__setattr__(instance, name, item.rule(name, getattr(instance, name)))


def documented(record: type[T]) -> type[T]:
    """Adds the list of a dataclass's fields and their meanings to its docstring; a class decorator."""
    lines = [inspect.cleandoc(record.__doc__ or "")]
    for group, items in by_group(record).items():
        lines.append(f"\n{group}:")
        for item in items:
            text = f"{item.name}: {item.description}{default_text(item.default)}"
            lines += textwrap.wrap(text, 120, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    record.__doc__ = "\n".join(lines)
    return record


def markdown_lines(record: type) -> list[str]:
    """Returns the lines of a table for the documentation: group by group the name, default and meaning of each field."""
    lines = []
    for group, items in by_group(record).items():
        lines.append(f"| **{group}** | | |")
        lines += [f"| `{item.name}` | {_shown(item.default)} | {item.description} |" for item in items]
    return lines


def default_text(value: Any) -> str:
    """Returns " (default: ...)" for the end of a description; empty for None and (), which mean that nothing is set."""
    return f" (default: {_shown(value)})" if _shown(value) else ""


def _shown(value: Any) -> str:
    if value is None or value == ():
        return ""
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns the sentence that refuses an unknown name, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown {kind} {name!r}: {remedy}"
