"""Templates: a row of a table -> a text.

A template is the name of one column (`question`), or text with columns in braces (`{name} is {food}`). Only `{column}`
is replaced, by the exact name of a column, spaces and dots included: there are no attributes, indices, conversions or
format specs. `{{` and `}}` are literal braces. Texts lose their outer white space; inner line breaks stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from prefixtune.data.files import Record
from prefixtune.errors import ConfigError, DataError, did_you_mean, short_repr

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def check_template(template: str) -> tuple[str, ...]:
    """The columns that a template names, in order.

    >>> check_template("{name} is {food}, {{sic}}"), check_template("question")
    (('name', 'food'), ('question',))

    Raises:
        ConfigError: A brace is not closed or not opened, or no column is named.
    """
    if "{" not in template and "}" not in template:
        columns = [template] if template.strip() else []
    else:
        columns = []
        for part in _PART.finditer(template):
            if part[0] in ("{", "}") or part[1] == "":
                raise ConfigError(
                    f"template {template!r}: {part[0]!r} at position {part.start()} names no column.",
                    hint="write {column}, and {{ or }} for a literal brace.",
                )
            if part[1] is not None:
                columns.append(part[1])
    if not columns:
        raise ConfigError(
            f"template {template!r} names no column; at least one is needed.",
            hint="write a column's name, or text with {column} in it.",
        )
    return tuple(columns)


def render(template: str, record: Mapping[str, Any], location: str) -> str:
    """One record as text.

    >>> render("{name} is {food}", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi is Italian'
    >>> render("name", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi'

    Args:
        template: A column's name, or text with `{column}` in it.
        record: Column -> text, number or truth value (`true`, `false`).
        location: The record's location, for messages.

    Raises:
        ConfigError: The template is malformed.
        DataError: A column is missing or has no text, or the result is empty.
    """
    columns = check_template(template)
    texts = {column: _as_text(_column(record, column, location), column, location) for column in columns}
    if template in texts:
        text = texts[template].strip()
    else:
        text = _PART.sub(lambda part: part[0][0] if part[1] is None else texts[part[1]], template).strip()
    if not text:
        raise DataError(f"{location}: {template!r} gives an empty text.", hint="fill the column, or drop the row.")
    return text


def targets_of(template: str, record: Record) -> list[str]:
    """The targets of a record: one, or several if the column holds a list.

    Raises:
        ConfigError: The template is malformed.
        DataError: A column is missing, has no text, or an empty list.
    """
    values = record.values.get(template)
    if not isinstance(values, list):
        return [render(template, record.values, record.location)]
    if not values:
        raise DataError(
            f"{record.location}: {template!r} is an empty list.", hint="give at least one target, or drop the row."
        )
    return [render(template, {template: value}, record.location) for value in values]


def _column(record: Mapping[str, Any], column: str, location: str) -> Any:
    if column not in record:
        raise DataError(f"{location}: there is no column {column!r}.", hint=did_you_mean(column, map(str, record)))
    return record[column]


def _as_text(value: Any, column: str, location: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise DataError(
        f"{location}: column {column!r} holds {short_repr(value)}; text, a number or a truth value is allowed.",
        hint="fill it in, or name another column; a list is a target's alone.",
    )
