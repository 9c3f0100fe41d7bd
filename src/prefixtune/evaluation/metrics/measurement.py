"""A measured metric: the score of all or some items, its bootstrap interval, and a test of two systems' difference.

Everything is computed from each item's statistics, so no text is scored twice. For intervals and tests, what the items
of a set share stays as it is in the whole set. That is how rare a word is among all references (NIST and CIDEr), and
how many references an item is padded to (WebNLG's BLEU).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from prefixtune.results import Comparison, Score

METHOD = "paired approximate randomization, two-sided"
_MAX_CELLS = 2_000_000
"""Cells of one block of draws: 16 MB, however many items there are."""
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Of numbers; the shape is documented where it is used."""


@dataclass(frozen=True)
class Measurement:
    """A metric computed once: the score of any subset of the items is a function of the sum of their rows.

    Attributes:
        values: One row per item, shape (items, columns): counts, or an item's own score and a 1.
        total: The score of such a sum, shape (columns,).
        implementation: As in `Score`.
        name: The metric's name.
        higher_is_better: False for error rates.
        independent: Whether an item's row is the same whatever other items are in the set. False if the references of
            the whole set determine how rare a word is, or how many references each item is padded to.
        remeasure: Measures the items with these indices as a set of their own; None: their rows are those here.
    """

    values: Array
    total: Callable[[Array], float]
    implementation: str
    name: str = ""
    higher_is_better: bool = True
    independent: bool = True
    remeasure: Callable[[Sequence[int]], Measurement] | None = None

    @property
    def score(self) -> float:
        """The figure of the whole set."""
        return float(self.total(self.values.sum(axis=0)))

    def to_score(self, *, level: float | None = None, samples: int = 1000, seed: int = 0) -> Score:
        """The score, with a confidence interval if a level is given (see `bootstrap`)."""
        return Score(
            name=self.name,
            score=self.score,
            implementation=self.implementation,
            higher_is_better=self.higher_is_better,
            interval=None if level is None else bootstrap(self, samples=samples, level=level, seed=seed),
        )

    def part(self, items: Sequence[int]) -> Measurement:
        """The measurement of the items with these indices, at least one, as if there were no others."""
        if self.remeasure is not None:
            return self.remeasure(items)
        return dataclasses.replace(self, values=self.values[list(items)])


def ratio(sums: Array) -> float:
    """The first of two sums divided by the second: a mean of the items' scores, or a loss per label."""
    return float(sums[0] / sums[1])


def average(scores: Sequence[float] | Array, implementation: str, *, independent: bool = True) -> Measurement:
    """A metric whose score is the mean of the items' scores."""
    values = np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=1)
    return Measurement(values, ratio, implementation, independent=independent)


def bootstrap(measured: Measurement, *, samples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile interval of the score: as many items are drawn with replacement, many times (Koehn 2004).

    Args:
        measured: The metric on all items.
        samples: How many sets of items are drawn; at least 2.
        level: Share of the drawn scores within the interval; between 0 and 1.
        seed: Seed of the draws; equal seeds give equal intervals.
    """
    count = len(measured.values)
    scores = []
    for rng, size in _blocks(samples, count, seed):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=size)
        scores += [measured.total(row) for row in draws @ measured.values]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def randomize(first: Measurement, second: Measurement, *, samples: int = 1000, seed: int = 0) -> Comparison:
    """Test whether two systems differ by more than chance (Riezler & Maxwell 2005; Noreen 1989).

    If both are equally good, it does not matter which of them wrote which output. So outputs are exchanged item by item
    with a fair coin, and the differences after these exchanges are compared with the real one.

    Args:
        first: One system.
        second: The other one, measured by the same metric on the same items.
        samples: How many random exchanges; at least 2. The smallest p-value is 1 / (samples + 1).
        seed: Seed of the coins.

    Raises:
        ValueError: The metrics or the numbers of items differ.
    """
    one, other, total = first.values, second.values, first.total
    if (first.name, len(one)) != (second.name, len(other)):
        raise ValueError(f"{first.name} of {len(one)} items cannot be compared with {second.name} of {len(other)}")
    difference = first.score - second.score
    # Sums of floats in another order differ in the last digits, but equal differences must count as equal.
    threshold = abs(difference) - 1e-12 * max(1.0, abs(first.score), abs(second.score))
    reached = 0
    for rng, size in _blocks(samples, len(one), seed):
        exchanged = rng.integers(0, 2, size=(size, len(one))) @ (other - one)
        for shift in exchanged:
            reached += abs(total(one.sum(axis=0) + shift) - total(other.sum(axis=0) - shift)) >= threshold
    return Comparison(
        name=first.name,
        first=first.score,
        second=second.score,
        difference=difference,
        p_value=(reached + 1) / (samples + 1),
        samples=samples,
        higher_is_better=first.higher_is_better,
        method=METHOD,
    )


def _blocks(samples: int, count: int, seed: int) -> Iterator[tuple[np.random.Generator, int]]:
    """The random generator and the number of draws of each block, so that a block fits into memory."""
    rng = np.random.default_rng(seed)
    size = max(1, _MAX_CELLS // count)
    for start in range(0, samples, size):
        yield rng, min(size, samples - start)
