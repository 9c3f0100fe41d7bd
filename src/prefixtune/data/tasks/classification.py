"""Text -> one label: a table of texts and labels, and the checks of its labels.

Columns are named by templates as in `records`: the name of one column (`text`), or text with columns in braces
(`{premise} => {hypothesis}`). Unlike there, each row is an example of its own: a text that occurs twice counts twice,
as in the published figures of a test set.

A label is a string. Whole numbers and truth values become the text that JSON writes for them (`3`, `true`). Other
numbers are refused, because an amount is not a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, iter_file
from prefixtune.data.templates import check_template, render
from prefixtune.errors import DataError, did_you_mean


def read_classification(path: Path, source: str | None = None, target: str | None = None) -> list[Example]:
    """Read a file of texts and labels (see `files.FORMATS`).

    Args:
        path: The file.
        source: Template of the text; None: the column `text`.
        target: Template of the label; None: the column `label`.

    Returns:
        One example per row, with one target; `fields` is the row.

    Raises:
        ConfigError: A template is malformed.
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    source = "text" if source is None else source
    target = "label" if target is None else target
    for template in (source, target):
        check_template(template)
    return [labelled_example(record, source, target) for record in iter_file(path)]


def labelled_example(record: Record, source: str, target: str) -> Example:
    """The example of a row: a text and its label, by their templates.

    Raises:
        DataError: A column is missing or has no text, or the label is none.
    """
    return Example(render(source, record.values, record.location), (_label(target, record),), record.values)


def label_names(examples: Iterable[Example]) -> tuple[str, ...]:
    """The distinct labels of a training set, sorted as text.

    >>> label_names([Example("Splendid.", ("good",)), Example("Dull.", ("bad",)), Example("Fine.", ("good",))])
    ('bad', 'good')

    Raises:
        DataError: There are fewer than two labels, or an example does not have exactly one.
    """
    names = tuple(sorted({_only_label(example, number) for number, example in enumerate(examples, start=1)}))
    if len(names) < 2:
        reason = f"all examples have the label {names[0]!r}" if names else "there is no example"
        raise DataError(f"{reason}; at least two labels are needed.", hint="check the file and the target column.")
    return names


def check_labels(examples: Iterable[Example], labels: Sequence[str]) -> None:
    """Check that a development or test set has no label that the training set lacks.

    Args:
        examples: The set to check.
        labels: The known labels, as `label_names` gives them.

    Raises:
        DataError: A label is unknown (the message names it, its first example and the nearest known one), or an example
            does not have exactly one.
    """
    for number, example in enumerate(examples, start=1):
        label = _only_label(example, number)
        if label not in labels:
            raise DataError(
                f"label {label!r} of example {number} is not one of the {len(labels)} known labels.",
                hint=did_you_mean(label, labels),
            )


def _only_label(example: Example, number: int) -> str:
    if len(example.targets) != 1:
        raise DataError(
            f"example {number} ({example.source[:60]!r}) has {len(example.targets)} labels; exactly one is needed.",
            hint="name the column that holds the label, with target.",
        )
    return example.targets[0]


def _label(template: str, record: Record) -> str:
    """The one label of a row; a column may hold it in a list of one."""
    value = record.values.get(template)
    if isinstance(value, list):
        if len(value) != 1:
            raise DataError(
                f"{record.location}: {template!r} holds {len(value)} labels; exactly one is needed.",
                hint="keep one label, or split the row.",
            )
        value = value[0]
    if isinstance(value, float):
        raise DataError(
            f"{record.location}: label {value!r} is not a whole number; text, a whole number or a truth value is "
            "allowed.",
            hint="write the classes as text, or name another target column.",
        )
    return render(
        template, {**record.values, template: value} if template in record.values else record.values, record.location
    )
