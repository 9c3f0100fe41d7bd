"""The labels of a training set, and the check that another set has no others: one per example, or one tag per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prefixtune.data.examples import Example, TaskKind
from prefixtune.errors import DataError, did_you_mean, short_repr


def label_names(examples: Iterable[Example], kind: TaskKind = "classification") -> tuple[str, ...]:
    """The distinct labels of a training set, sorted as text; of tags `O`, then for each type, sorted, `B-` and `I-`.

    Both tags of a type are listed even if only one occurs, so that a longer span elsewhere has no unknown tag.

    >>> label_names([Example("Splendid.", ("good",)), Example("Dull.", ("bad",)), Example("Fine.", ("good",))])
    ('bad', 'good')
    >>> label_names([Example("Westport at", fields={"tags": ("B-STATION", "O")})], "tagging")
    ('O', 'B-STATION', 'I-STATION')

    Raises:
        DataError: There are fewer than two labels, or an example does not have what it must.
    """
    found = {label for number, example in enumerate(examples, start=1) for label in _labels(example, number, kind)}
    names = tuple(sorted(found))
    if kind == "tagging":
        types = sorted({tag[2:] for tag in names} - {""})
        names = ("O", *(f"{position}-{name}" for name in types for position in "BI"))
    if len(names) < 2:
        raise DataError(f"the labels are {short_repr(names)}, but there must be two.", hint="check the target column.")
    return names


def check_labels(examples: Iterable[Example], names: Sequence[str], kind: TaskKind = "classification") -> None:
    """Check that a development or test set has no label that the training set lacks.

    Args:
        examples: The set to check.
        names: The known labels, as `label_names` gives them.
        kind: Of the labels.

    Raises:
        DataError: A label is unknown (the message names it, its first example and the nearest known one), or an example
            does not have what it must.
    """
    for number, example in enumerate(examples, start=1):
        for label in _labels(example, number, kind):
            if label not in names:
                what = f"label {short_repr(label)} of example {number} is not known."
                raise DataError(what, hint=did_you_mean(label, names))


def _labels(example: Example, number: int, kind: TaskKind) -> Sequence[str]:
    labels = example.fields.get("tags") if kind == "tagging" else example.targets
    if not isinstance(labels, tuple) or (kind == "classification" and len(labels) != 1):
        needed = "one label" if kind == "classification" else "tags"
        where = f"example {number} ({short_repr(example.source)})"
        raise DataError(f"{where} must have {needed}.", hint="name their column with --target.")
    return labels
