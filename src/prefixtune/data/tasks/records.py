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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, ExampleLike
from prefixtune.data.files import Row, read_rows
from prefixtune.errors import ConfigError, DataError, describe_value, did_you_mean

__all__ = ["as_examples", "check_template", "read_records", "render", "targets_of"]


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
    return _merge(read_rows(path), source, target)


def as_examples(
    given: Sequence[ExampleLike], source: str | None = None, target: str | None = None, what: str = "example"
) -> list[Example]:
    """The examples that a caller gave, as `Example`s or as dicts.

    >>> as_examples([{"source": "1+1", "target": "2"}])
    [Example(source='1+1', targets=('2',), fields={}, groups={})]
    >>> as_examples([{"name": "Aromi", "food": "Italian", "text": "Eat there."}], "{name} is {food}", "text")[0].source
    'Aromi is Italian'

    Args:
        given: Examples. A dict is a record where `source` is given; else it has `source`, `target` or `targets`, and
            may have `fields` and `groups`.
        source: Template of the source; equal sources of records are merged, as in `read_records`.
        target: Template of the target.
        what: What one is called in messages.

    Raises:
        ConfigError: A template is malformed.
        DataError: It is no list of these, or one of them is wrong.
    """
    if isinstance(given, str | Mapping) or not (hasattr(given, "__len__") and hasattr(given, "__iter__")):
        raise DataError(
            f"the {what}s are {describe_value(given)}, but must be a list of dicts or of Example.",
            hint='write [{"source": "...", "target": "..."}], or read a file with `prefixtune.data.read_task`.',
        )
    records = [dict(one) for one in given if isinstance(one, Mapping)]
    if source is not None and len(records) == len(given):
        return _merge((Row(f"{what} {n}", record) for n, record in enumerate(records, start=1)), source, target)
    return [
        one if isinstance(one, Example) else _as_example(one, f"{what} {n}") for n, one in enumerate(given, start=1)
    ]


def _as_example(given: Any, where: str) -> Example:
    """One example of a dict of its fields."""
    hint = 'write {"source": "...", "target": "..."}; `prefixtune.data.as_examples` takes templates for other records.'
    if not isinstance(given, Mapping):
        raise DataError(f"{where} is {describe_value(given)}, but must be a dict or an Example.", hint=hint)
    known = ("source", "target", "targets", "fields", "groups")
    unknown = [str(key) for key in given if key not in known]
    if unknown or "source" not in given or {"target", "targets"} <= given.keys():
        why = f"the unknown key {unknown[0]!r}" if unknown else f"the keys {', '.join(map(str, given))}"
        raise DataError(f"{where} has {why}, but must have source, and target or targets.", hint=hint)
    targets = given.get("targets", [given["target"]] if "target" in given else [])
    targets = (targets,) if isinstance(targets, str) else targets
    if not isinstance(given["source"], str):
        raise DataError(f"the source of {where} is {describe_value(given['source'])}, not a text.", hint=hint)
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"the targets of {where} are {describe_value(targets)}, not texts.", hint=hint)
    for key in ("fields", "groups"):
        if not isinstance(given.get(key, {}), Mapping):
            raise DataError(f"the {key} of {where} are {describe_value(given[key])}, not a dict.", hint=hint)
    return Example(given["source"], tuple(targets), given.get("fields", {}), given.get("groups", {}))


def _merge(rows: Iterable[Row], source: str, target: str | None) -> list[Example]:
    """One example for each distinct source of the rows."""
    first: dict[str, Row] = {}
    targets: dict[str, list[str]] = {}
    for row in rows:
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
