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

from prefixtune.data.files import Record, missing_column, wrong_value
from prefixtune.errors import ConfigError, short_repr

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def check_template(template: str) -> tuple[str, ...]:
    """The columns that a template names, in order.

    >>> check_template("{name} is {food}, {{sic}}"), check_template("question")
    (('name', 'food'), ('question',))

    Raises:
        ConfigError: A brace is not closed or not opened, or no column is named.
    """
    parts = list(_PART.finditer(template))
    columns = [part[1] for part in parts if part[1] is not None] if parts else [template if template.strip() else ""]
    if not columns or not all(columns) or any(part[0] in ("{", "}") for part in parts):
        raise ConfigError(
            f"the template {short_repr(template)} names no column, or has a brace that stands alone.",
            hint="write a column's name, or text with {column} in it; {{ and }} are literal braces.",
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
    texts: dict[str, str] = {}
    for column in check_template(template):
        if column not in record:
            raise missing_column(location, [column], record)
        texts[column] = _as_text(record[column], column, location)
    if template in texts:
        text = texts[template].strip()
    else:
        text = _PART.sub(lambda part: part[0][0] if part[1] is None else texts[part[1]], template).strip()
    if not text:
        raise wrong_value(location, template, text, "text")
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
        raise wrong_value(record.location, template, values, "at least one target")
    return [render(template, {template: value}, record.location) for value in values]


def _as_text(value: Any, column: str, location: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise wrong_value(location, column, value, "text, a number or a truth value")
