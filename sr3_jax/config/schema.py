"""Operations on the table of fields: look-up, checks of types and ranges, parsing of text, and the reference.

`python -m sr3_jax.config.schema` prints the reference as Markdown.
"""

from __future__ import annotations

import ast
import difflib
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from sr3_jax.config.fields import RENAMED, SECTIONS, Field
from sr3_jax.errors import UserError

_LONGEST_QUOTE = 200  # characters
TYPES = {
    tuple: "a tuple of whole numbers",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def type_name(field: Field) -> str:
    """The type of a field, in words that follow 'must be'."""
    return "two numbers, least and most" if field.is_range else TYPES[type(field.default)]


def fields() -> Iterator[tuple[str, str, Field]]:
    """Every field with the names of its section and its own."""
    for name, section in SECTIONS.items():
        for field_name, field in section.fields.items():
            yield name, field_name, field


def defaults() -> dict[str, dict[str, Any]]:
    """A new config of default values."""
    return {
        name: {field_name: field.default for field_name, field in section.fields.items()}
        for name, section in SECTIONS.items()
    }


def check_section(section: str) -> None:
    """Raise UserError if the section does not exist."""
    if section not in SECTIONS:
        raise UserError(f"config has no section {section!r}; {_suggestion(section, SECTIONS)}")


def lookup(section: str, name: str) -> Field:
    """The field of that name.

    Raises:
        UserError: the section or field does not exist; the message gives the nearest name, or the new one.
    """
    if (section, name) in RENAMED:
        new = ".".join(RENAMED[section, name])
        raise UserError(f"config.{section}.{name} has been renamed: use config.{new}")
    check_section(section)
    known = SECTIONS[section].fields
    if name not in known:
        raise UserError(f"config.{section} has no field {name!r}; {_suggestion(name, known)}")
    return known[name]


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"


def check_type(section: str, name: str, value: Any, *, default: Any = None) -> Any:
    """The value as its field's type: whole floats pass for ints, ints for floats, lists and arrays for tuples.

    Args:
        default: the value to quote in an error as the default; None for the schema's.

    Raises:
        UserError: no such field, or a value of another type.
    """
    field = lookup(section, name)
    kind = type(field.default)
    plain = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if kind is float and type(plain) is int:
        plain = float(plain) if abs(plain) < 1e300 else math.inf
    if kind is int and type(plain) is float and plain.is_integer():
        plain = int(plain)
    if kind is tuple and not field.is_range and isinstance(plain, list | tuple):
        items = [item.item() if isinstance(item, np.generic) else item for item in plain]
        if all(type(item) is int for item in items):
            return tuple(items)
    if field.is_range and isinstance(plain, list | tuple) and len(plain) == 2:
        ends = [end.item() if isinstance(end, np.generic) else end for end in plain]
        if all(type(end) in (int, float) and math.isfinite(end) for end in ends):
            return tuple(map(float, ends))
    if type(plain) is not kind or kind is tuple or (kind is float and not math.isfinite(plain)):
        usual = field.default if default is None else default
        raise UserError(
            f"config.{section}.{name} must be {type_name(field)}, got {quoted(plain)}; the default is {usual!r}"
        )
    return plain


def parse(section: str, name: str, text: str, *, default: Any = None) -> Any:
    """The value of a field given as text: true and false in any case, numbers and tuples as Python literals.

    Raises:
        UserError: as `check_type`.
    """
    if isinstance(lookup(section, name).default, str):
        return text
    value: Any = {"true": True, "false": False}.get(text.lower())
    if value is None:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    return check_type(section, name, value, default=default)


def check_ranges(config: Mapping[str, Mapping[str, Any]]) -> None:
    """Check each field of a complete config against its choices or bounds.

    Raises:
        UserError: the first field with a value that is not allowed.
    """
    for section, name, field in fields():
        if not field.contains(config[section][name]):
            invalid(section, name, config[section][name], f"be {field.allowed()}")


def invalid(section: str, name: str, value: Any, rule: str) -> NoReturn:
    """Raise the error of one field: `rule` follows 'must'."""
    raise UserError(f"config.{section}.{name} must {rule}, got {quoted(value)}")


def quoted(value: Any) -> str:
    """The value for an error: that of a model file may be long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def render_text(*, width: int = 110) -> str:
    """All sections and fields for a terminal, with defaults, choices and help."""
    column = 34
    lines = []
    for section, group in SECTIONS.items():
        lines += ["", f"{section}: {group.help}"]
        for name, field in group.fields.items():
            left = f"  {section}.{name}={_shown(field.default)}"
            text = f"{field.help} O{field.allowed()[1:]}." if field.values else field.help
            first, *rest = textwrap.wrap(text, width - column)
            if len(left) + 2 > column:
                lines += [left, " " * column + first]
            else:
                lines.append(left.ljust(column) + first)
            lines += [" " * column + line for line in rest]
    return "\n".join(lines[1:])


def markdown() -> str:
    """The config reference of the documentation: one table per section."""
    lines = [
        "# Config reference",
        "",
        "Override a field of a config on the command line as `--config.SECTION.FIELD=VALUE`, with a space instead of",
        "`=`, or as `--config.SECTION.FIELD` for true. `sr3 configs` lists the presets, and `sr3 configs NAME` prints",
        "all fields of one. Fields marked with † cannot change when a run is resumed.",
    ]
    for section, group in SECTIONS.items():
        lines += ["", f"## {section}", "", group.help, ""]
        lines += ["| field | default | values | description |", "|---|---|---|---|"]
        for name, field in group.fields.items():
            values = field.allowed() or type_name(field)
            mark = " †" * field.fixed
            lines.append(f"| `{name}`{mark} | `{_shown(field.default)}` | {values} | {field.help} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) if value else "()"
    return "''" if value == "" else str(value)


if __name__ == "__main__":
    print(markdown(), end="")
