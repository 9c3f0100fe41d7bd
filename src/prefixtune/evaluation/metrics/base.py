"""What every metric returns: the statistics of each item that its score is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Of numbers; the shape is documented where it is used."""


class Unavailable(ValueError):
    """A metric cannot be computed: a program or a library is missing here, or it cannot read such texts.

    Args:
        reason: What is missing or why, as a sentence without its full stop.
        remedy: How to get it, or what to do instead.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


def squeeze(text: str) -> str:
    r"""A text on one line: every run of white space, line and paragraph separators among it, becomes one space.

    >>> squeeze(" a\tb\u2028c\n")
    'a b c'
    """
    return " ".join(text.split())


def package_version(name: str, needed_by: str, *, extra: str = "scores") -> str:
    """The version of an installed package of an extra.

    Raises:
        Unavailable: It is not installed.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise Unavailable(
            f"{name} is not installed, and {needed_by} needs it", f"pip install 'prefixtune[{extra}]'"
        ) from error


@dataclass(frozen=True)
class ItemStatistics:
    """The sufficient statistics of a set of items: the score of any subset is a function of the sum of its rows.

    Attributes:
        values: One row per item, shape (items, columns): counts, or an item's own score and a 1.
        total: The score of such a sum, shape (columns,).
        implementation: As in `Score`.
        independent: Whether an item's row is the same whatever other items are in the set. False if the references of
            the whole set determine how rare a word is, or how many references each item is padded to.
    """

    values: Array
    total: Callable[[Array], float]
    implementation: str
    independent: bool = True


def average(scores: Sequence[float] | Array, implementation: str, *, independent: bool = True) -> ItemStatistics:
    """The statistics of a metric whose score is the mean of the items' scores."""
    values = np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=1)
    return ItemStatistics(values, _mean, implementation, independent)


def _mean(sums: Array) -> float:
    return float(sums[0] / sums[1])


def check_counts(predictions: Sized, references: Sized, what: str) -> None:
    """Refuse unequal counts and empty sets.

    Raises:
        ValueError: They are unequal or zero.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions for {len(predictions)} {what} but references for {len(references)}; counts must agree"
        )
    if not references:
        raise ValueError(f"there are no {what}; at least one is needed")
