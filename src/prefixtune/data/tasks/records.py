"""The user's own data: a table of records, and two templates that make a source and a target of each record.

Equal sources are merged into one example, in order of first appearance, with all their targets in order; the example's
`fields` is the first of the records. Sources and targets lose their outer white space; inner line breaks stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, ExampleLike, check_messages, merge_examples
from prefixtune.data.files import Record, iter_file
from prefixtune.data.forms import Form, detect_form, make_example
from prefixtune.data.templates import check_template, render, targets_of
from prefixtune.errors import ConfigError, DataError, describe_value

_FIELDS = frozenset(("source", "target", "targets", "fields", "groups", "messages"))
"""What a dict of an example's fields may have."""
_HINT = 'write {"source": "...", "target": "..."}; `prefixtune.data.as_examples` takes templates for other records.'


def read_records(path: Path, source: str | None, target: str | None = None) -> list[Example]:
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
    if source is None:
        raise ConfigError(f"target is {target!r}, but there is no source.", hint="give both, or leave target out.")
    for template in (source, target):
        if template is not None:
            check_template(template)
    return merge_examples(_render_all(iter_file(path), source, target))


def as_examples(
    examples: Sequence[ExampleLike],
    source: str | None = None,
    target: str | None = None,
    what: str = "example",
    *,
    form: str = "",
    needs_targets: bool = False,
) -> list[Example]:
    """The examples of a list of `Example`s or dicts.

    >>> as_examples([{"source": "1+1", "target": "2"}])
    [Example(source='1+1', targets=('2',), fields={}, groups={}, messages=())]
    >>> as_examples([{"name": "Aromi", "food": "Italian", "text": "Eat there."}], "{name} is {food}", "text")[0].source
    'Aromi is Italian'
    >>> as_examples([{"prompt": "1+1", "completion": "2"}])[0].targets
    ('2',)

    Args:
        examples: `Example`s or dicts. With a template `source`, a dict is a record. Without, it has the fields of an
            `Example` (`source`, `target` or `targets`, perhaps `fields`, `groups` and `messages`); or it is a row of
            one of the forms of `forms`, such as `{"messages": [...]}`, and so are all others.
        source: Template of the source; equal sources of records are merged, as in `read_records`.
        target: Template of the target.
        what: What messages call an example.
        form: The form that rows must have; empty: any that fits.
        needs_targets: A row of a form is refused if it has no target.

    Raises:
        ConfigError: A template is malformed, or several forms fit.
        DataError: It is not a list of these, or one of them is wrong.
    """
    _check_list(examples, what)
    rows = [dict(example) for example in examples if isinstance(example, Mapping)]
    if source is not None and len(rows) == len(examples):
        records = (Record(f"{what} {number}", row) for number, row in enumerate(rows, start=1))
        return merge_examples(_render_all(records, source, target))
    rows_form = example_form(examples, what, form=form)

    def convert(example: Any, location: str) -> Example:
        if isinstance(example, Example):
            return example
        if rows_form is None or not isinstance(example, Mapping) or (not form and _has_fields(example)):
            return _as_example(example, location)
        return make_example(Record(location, dict(example)), rows_form, needs_targets=needs_targets)

    return [convert(example, f"{what} {number}") for number, example in enumerate(examples, start=1)]


def example_form(examples: Sequence[Any], what: str = "example", *, form: str = "") -> Form | None:
    """The form of a list's dicts, by the first that has not the fields of an `Example`; None: there is no such dict.

    Raises:
        ConfigError: Several forms fit, or there is no form of that name.
        DataError: None fits, or not the one that was named.
    """
    _check_list(examples, what)
    for number, row in enumerate(examples, start=1):
        if isinstance(row, Mapping) and (form or not _has_fields(row)):
            return detect_form(row, f"{what} {number}", form=form, needs_targets=False)
    return None


def _check_list(examples: Any, what: str) -> None:
    """Refuse what is no list.

    Raises:
        DataError: It is something else.
    """
    if isinstance(examples, str | Mapping) or not (hasattr(examples, "__len__") and hasattr(examples, "__iter__")):
        raise DataError(
            f"the {what}s are {describe_value(examples)}, but must be a list of dicts or of Example.",
            hint='write [{"source": "...", "target": "..."}], or read a file with `prefixtune.data.read_task`.',
        )


def _has_fields(row: Mapping[str, Any]) -> bool:
    """Whether a dict has the fields of an `Example`; else it is a row of a form.

    Of chats that are collected, the column `source` says where each is from.
    """
    if "messages" in row:
        return bool({"target", "targets", "groups"} & row.keys())
    return "source" in row and row.keys() <= _FIELDS


def _as_example(values: Any, location: str) -> Example:
    """The example of a dict of its fields."""
    if not isinstance(values, Mapping):
        raise DataError(f"{location} is {describe_value(values)}, but must be a dict or an Example.", hint=_HINT)
    fields = dict(values)
    if "target" in fields and "targets" not in fields:
        fields["targets"] = (fields.pop("target"),)
    try:
        messages = fields["messages"] = check_messages(fields["messages"]) if "messages" in fields else ()
        fields.setdefault("source", messages[-1].content if messages else None)
        return Example(**fields)
    except TypeError:
        raise DataError(f"{location} has the keys {', '.join(map(str, values))}.", hint=_HINT) from None
    except DataError as error:
        raise DataError(f"{location}: {error.message}", hint=error.hint) from None


def _render_all(records: Iterable[Record], source: str, target: str | None) -> Iterator[Example]:
    """The example of each record."""
    for record in records:
        text = render(source, record.values, record.location)
        yield Example(text, () if target is None else tuple(targets_of(target, record)), record.values)
