"""People's own data: a table of records, and two templates that make a source and a target of each.

A template is the name of one column (`question`), or text with columns in braces (`{name} is {food}`). Only `{column}`
is replaced, by the exact name of a column, spaces and dots included: there are no attributes, indices, conversions or
format specs. `{{` and `}}` are literal braces.

Equal sources are merged into one example, in order of first appearance, with all their targets in order; the example's
`fields` is the first of the records. Sources and targets lose their outer white space; inner line breaks stay.

Knows nothing of tokenizers or training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.tasks.examples import Example
from prefixtune.tasks.reading import Row, read_rows

__all__ = ["check_template", "read_records", "render", "targets_of"]

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


def render(template: str, record: Mapping[str, Any], where: str) -> str:
    """One record as text.

    >>> render("{name} is {food}", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi is Italian'
    >>> render("name", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi'

    Args:
        template: A column's name, or text with `{column}` in it.
        record: Column -> text, number or truth value (`true`, `false`).
        where: Where the record stands, for messages.

    Raises:
        ConfigError: The template is malformed.
        DataError: A column is missing or holds no text, or the result is empty.
    """
    columns = check_template(template)
    texts = {column: _as_text(_column(record, column, where), column, where) for column in columns}
    if template in texts:
        text = texts[template].strip()
    else:
        text = _PART.sub(lambda part: part[0][0] if part[1] is None else texts[part[1]], template).strip()
    if not text:
        raise DataError(f"{where}: {template!r} gives an empty text.", hint="fill the column, or drop the row.")
    return text


def read_records(path: Path, source: str, target: str | None = None) -> list[Example]:
    """Read `.jsonl`, `.json` (a list), `.csv` or `.tsv`, each also `.gz`.

    Args:
        path: The file.
        source: Template of the source.
        target: Template of the target; the name of a column that holds a list gives several targets; None where only
            generation is meant.

    Returns:
        One example for each distinct source.

    Raises:
        ConfigError: A template is malformed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    for template in (source, target):
        if template is not None:
            check_template(template)
    first: dict[str, Row] = {}
    targets: dict[str, list[str]] = {}
    for row in read_rows(path):
        text = render(source, row.values, row.where)
        first.setdefault(text, row)
        targets.setdefault(text, []).extend([] if target is None else targets_of(target, row))
    return [Example(text, tuple(targets[text]), row.values) for text, row in first.items()]


def targets_of(template: str, row: Row) -> list[str]:
    """The targets of a row: one, or each of a column that holds a list.

    Raises:
        ConfigError: The template is malformed.
        DataError: A column is missing, holds no text, or an empty list.
    """
    values = row.values.get(template)
    if not isinstance(values, list):
        return [render(template, row.values, row.where)]
    if not values:
        raise DataError(
            f"{row.where}: {template!r} is an empty list.", hint="give at least one target, or drop the row."
        )
    return [render(template, {template: value}, row.where) for value in values]


def _column(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise DataError(f"{where}: there is no column {column!r}.", hint=did_you_mean(column, map(str, record)))
    return record[column]


def _as_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, float):
        kind = f"{value}, which is no amount"
    else:
        kind = "nothing (null)" if value is None else "a list" if isinstance(value, list) else "an object"
    raise DataError(
        f"{where}: column {column!r} holds {kind}; text, a number or a truth value is allowed.",
        hint="only a target that is one column's name may hold a list." if isinstance(value, list) else "fill it in.",
    )
