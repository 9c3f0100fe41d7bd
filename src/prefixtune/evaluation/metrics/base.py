"""What every metric returns: a score, and the statistics of each item that the score is computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias, TypeGuard

import numpy as np

__all__ = [
    "Array",
    "ItemStatistics",
    "Score",
    "Unavailable",
    "average",
    "check_counts",
    "check_references",
    "package_version",
]


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
class Score:
    """One figure, and how it was computed.

    Attributes:
        name: The metric's name.
        score: The figure, on the metric's usual scale.
        implementation: Library, version and settings, or this package and the definition in short. Figures of different
            implementations cannot be compared.
        higher_is_better: False for error rates.
        interval: Low and high end of a confidence interval, if one was requested.
    """

    name: str
    score: float
    implementation: str
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the interval only if there is one."""
        names = ("score", "implementation", "higher_is_better")
        return {name: getattr(self, name) for name in names} | ({"interval": [*self.interval]} if self.interval else {})


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


def check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]]:
    """The references without blank ones, after checking that everything can be scored.

    Raises:
        ValueError: They are no texts, the counts differ, there is no item, or an item has no reference.
    """
    if not (_are_texts(hypotheses) and _is_list(references) and all(map(_are_texts, references))):
        raise ValueError("hypotheses must be a list of strings, and references a list of lists of strings")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} items; counts must agree")
    if not hypotheses:
        raise ValueError("there is no hypothesis; at least one is needed")
    kept = [[text for text in item if text.strip()] for item in references]
    for index, item in enumerate(kept):
        if not item:
            raise ValueError(f"item {index} (from 0) has no reference; at least one text is needed")
    return kept


def _are_texts(value: object) -> bool:
    return _is_list(value) and all(isinstance(text, str) for text in value)


def _is_list(value: object) -> TypeGuard[Collection[object]]:
    return isinstance(value, Collection) and not isinstance(value, str)


def check_counts(predictions: Collection[object], references: Collection[object], what: str) -> None:
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
