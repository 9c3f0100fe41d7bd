"""What a metric gives: a score, and before it what each item adds to that score.

Knows nothing of any one metric.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Array", "Measurement", "Rows", "Score", "Unavailable", "check", "check_counts"]


Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Of numbers; its shape is told where it is used."""


class Unavailable(ValueError):
    """A metric cannot be computed on this machine: a program, a library or weights are missing.

    Args:
        reason: What is missing, as a sentence without its full stop.
        remedy: How to get it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Score:
    """One figure, with what made it.

    Attributes:
        name: Of the metric.
        score: The figure, on the metric's usual scale.
        implementation: Library, version and settings, or this package and the definition in short: figures of different
            implementations do not compare.
        higher_is_better: False for error rates.
        interval: Low and high end of a confidence interval, where one was asked for.
    """

    name: str
    score: float
    implementation: str
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Rows:
    """The sufficient statistics of a set of items.

    Attributes:
        values: One row an item, shape (items, columns): counts, or an item's own score and a 1.
        total: The score of a sum of such rows, shape (columns,).
        implementation: As in `Score`.
        local: Whether a row is the same whatever other items are in the set. Not so where references of the whole set
            say how rare a word is.
    """

    values: Array
    total: Callable[[Array], float]
    implementation: str
    local: bool = True


@dataclass(frozen=True)
class Measurement:
    """A metric computed once; scores of the set and of its parts, intervals and comparisons come from it cheaply.

    Attributes:
        name: Of the metric, for people.
        higher_is_better: False for error rates.
        rows: What each item adds.
        again: Measures the items of these numbers as a set of their own.
    """

    name: str
    higher_is_better: bool
    rows: Rows
    again: Callable[[Sequence[int]], Rows]

    def __len__(self) -> int:
        """The number of items."""
        return len(self.rows.values)

    @property
    def score(self) -> float:
        """The figure of the whole set."""
        return float(self.rows.total(self.rows.values.sum(axis=0)))

    def to_score(self, *, level: float | None = None, samples: int = 1000, seed: int = 0) -> Score:
        """The score, with a confidence interval where a level is given (see `resampling.bootstrap`)."""
        from prefixtune.evaluation.metrics.significance import bootstrap

        interval = None if level is None else bootstrap(self, samples=samples, level=level, seed=seed)
        return Score(self.name, self.score, self.rows.implementation, self.higher_is_better, interval)

    def part(self, items: Sequence[int]) -> Measurement:
        """The measurement of some of the items, as if they were all there is.

        Args:
            items: Their numbers, from 0; at least one.

        Raises:
            ValueError: There is none, or one is out of range.
        """
        chosen = list(items)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self):
            raise ValueError(f"a part holds at least one item, numbered 0 to {len(self) - 1}; got {chosen[:5]}")
        if self.rows.local:
            rows = Rows(self.rows.values[chosen], self.rows.total, self.rows.implementation)
        else:
            rows = self.again(chosen)
        return Measurement(
            self.name, self.higher_is_better, rows, lambda inner: self.again([chosen[number] for number in inner])
        )


def check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]]:
    """The references without blank ones; refuses what cannot be scored.

    Raises:
        ValueError: The counts differ, there is no item, or an item has no reference.
    """
    if isinstance(hypotheses, str) or isinstance(references, str) or any(isinstance(item, str) for item in references):
        raise ValueError("hypotheses must be a list of strings, and references a list of lists of strings")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} items; counts must agree")
    if not hypotheses:
        raise ValueError("there is no hypothesis; at least one is needed")
    kept = [[text for text in item if text.strip()] for item in references]
    for number, item in enumerate(kept):
        if not item:
            raise ValueError(f"item {number} (from 0) has no reference; at least one text is needed")
    return kept


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
