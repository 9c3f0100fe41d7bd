"""Examples that a caller gives as a list, of `Example`s or of dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.data.examples import Example, ExampleLike, check_messages, merge_examples
from prefixtune.data.files import Record, listed
from prefixtune.data.forms import TEMPLATES, Form, detect_form, make_example
from prefixtune.errors import DataError, describe_value

_FIELDS = frozenset(("source", "target", "targets", "fields", "groups", "messages"))
"""What a dict of an example's fields may have."""
_HINT = 'write {"source": "...", "target": "..."}; `prefixtune.data.as_examples` takes templates for other records.'


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
        source: Template of the source; equal sources of records are merged, as in a file.
        target: Template of the target.
        what: What messages call an example.
        form: The form that rows must have; empty: any that fits.
        needs_targets: A row of a form is refused if it has no target.

    Raises:
        ConfigError: A template is malformed, or several forms fit.
        DataError: It is not a list of these, or one of them is wrong.
    """
    _check_list(examples, what)
    rows = [Record(f"{what} {n}", dict(one)) for n, one in enumerate(examples, start=1) if isinstance(one, Mapping)]
    if source is not None and len(rows) == len(examples):
        options: dict[str, Any] = {"needs_targets": target is not None, "templates": (source, target)}
        return merge_examples(make_example(row, TEMPLATES, **options) for row in rows)
    rows_form, left = example_form(examples, what, form=form), iter(rows)
    made: list[Example] = []
    for number, example in enumerate(examples, start=1):
        row = next(left) if isinstance(example, Mapping) else None
        if row is not None and rows_form is not None and (form or not _has_fields(row.values)):
            made.append(make_example(row, rows_form, needs_targets=needs_targets))
        else:
            made.append(example if isinstance(example, Example) else _as_example(example, f"{what} {number}"))
    return made


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
        raise DataError(f"the {what}s are {describe_value(examples)}, not a list of dicts or of Example.", hint=_HINT)


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
        raise DataError(f"{location} has the keys {listed(values)}.", hint=_HINT) from None
    except DataError as error:
        raise DataError(f"{location}: {error.message}", hint=error.hint) from None
