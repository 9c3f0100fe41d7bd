"""The user's own data: a table of records, and two templates that make a source and a target of each record.

A template is the name of one column (`question`), or text with columns in braces (`{name} is {food}`). Only `{column}`
is replaced, by the exact name of a column, spaces and dots included: there are no attributes, indices, conversions or
format specs. `{{` and `}}` are literal braces.

Equal sources are merged into one example, in order of first appearance, with all their targets in order; the example's
`fields` is the first of the records. Sources and targets lose their outer white space; inner line breaks stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, ExampleLike, chat_example, check_messages
from prefixtune.data.files import Record, read_file
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


def read_records(path: Path, source: str, target: str | None = None) -> list[Example]:
    """Read a file of records (see `files.FORMATS`).

    Args:
        path: The file.
        source: Template of the source.
        target: Template of the target; the name of a column that holds a list gives several targets; None if the data
            is only for generation.

    Returns:
        One example for each distinct source.

    Raises:
        ConfigError: A template is malformed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    for template in (source, target):
        if template is not None:
            check_template(template)
    return _merge(read_file(path), source, target)


def as_examples(
    examples: Sequence[ExampleLike], source: str | None = None, target: str | None = None, what: str = "example"
) -> list[Example]:
    """The examples of a list of `Example`s or dicts.

    >>> as_examples([{"source": "1+1", "target": "2"}])
    [Example(source='1+1', targets=('2',), fields={}, groups={}, messages=())]
    >>> as_examples([{"name": "Aromi", "food": "Italian", "text": "Eat there."}], "{name} is {food}", "text")[0].source
    'Aromi is Italian'

    Args:
        examples: `Example`s or dicts. With a template `source`, a dict is a record; without, it has `source`, `target`
            or `targets`, and may have `fields` and `groups`.
        source: Template of the source; equal sources of records are merged, as in `read_records`.
        target: Template of the target.
        what: What messages call an example.

    Raises:
        ConfigError: A template is malformed.
        DataError: It is not a list of these, or one of them is wrong.
    """
    if isinstance(examples, str | Mapping) or not (hasattr(examples, "__len__") and hasattr(examples, "__iter__")):
        raise DataError(
            f"the {what}s are {describe_value(examples)}, but must be a list of dicts or of Example.",
            hint='write [{"source": "...", "target": "..."}], or read a file with `prefixtune.data.read_task`.',
        )
    rows = [dict(example) for example in examples if isinstance(example, Mapping)]
    if source is not None and len(rows) == len(examples):
        return _merge((Record(f"{what} {number}", row) for number, row in enumerate(rows, start=1)), source, target)
    return [
        example if isinstance(example, Example) else _as_example(example, f"{what} {number}")
        for number, example in enumerate(examples, start=1)
    ]


def _as_example(values: Any, location: str) -> Example:
    """The example of a dict of its fields."""
    hint = 'write {"source": "...", "target": "..."}; `prefixtune.data.as_examples` takes templates for other records.'
    if not isinstance(values, Mapping):
        raise DataError(f"{location} is {describe_value(values)}, but must be a dict or an Example.", hint=hint)
    known = ("source", "target", "targets", "fields", "groups", "messages")
    unknown = [str(key) for key in values if key not in known]
    if unknown or not {"source", "messages"} & values.keys() or {"target", "targets"} <= values.keys():
        why = f"the unknown key {unknown[0]!r}" if unknown else f"the keys {', '.join(map(str, values))}"
        raise DataError(f"{location} has {why}, but must have source, and target or targets.", hint=hint)
    targets = values.get("targets", [values["target"]] if "target" in values else [])
    targets = (targets,) if isinstance(targets, str) else targets
    if not isinstance(values.get("source", ""), str):
        raise DataError(f"the source of {location} is {describe_value(values['source'])}, not a text.", hint=hint)
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"the targets of {location} are {describe_value(targets)}, not texts.", hint=hint)
    for key in ("fields", "groups"):
        if not isinstance(values.get(key, {}), Mapping):
            raise DataError(f"the {key} of {location} are {describe_value(values[key])}, not a dict.", hint=hint)
    others = {key: values[key] for key in ("fields", "groups") if key in values}
    if "messages" not in values:
        return Example(values["source"], tuple(targets), **others)
    name = f"the conversation of {location}"
    if not {"source", "target", "targets"} & values.keys():
        return chat_example(values["messages"], name, **others)
    messages = check_messages(values["messages"], name)
    return Example(values.get("source", messages[-1].content), tuple(targets), messages=messages, **others)


def _merge(records: Iterable[Record], source: str, target: str | None) -> list[Example]:
    """One example for each distinct source of the records."""
    first: dict[str, Record] = {}
    targets: dict[str, list[str]] = {}
    for record in records:
        text = render(source, record.values, record.location)
        first.setdefault(text, record)
        targets.setdefault(text, []).extend([] if target is None else targets_of(target, record))
    return [Example(text, tuple(targets[text]), record.values) for text, record in first.items()]


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
    if isinstance(value, float):
        kind = f"{value}, which is not a number"
    else:
        kind = "nothing (null)" if value is None else "a list" if isinstance(value, list) else "an object"
    raise DataError(
        f"{location}: column {column!r} holds {kind}; text, a number or a truth value is allowed.",
        hint="only a target that is one column's name may hold a list." if isinstance(value, list) else "fill it in.",
    )
