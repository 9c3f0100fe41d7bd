"""A measured metric: the score of all or some items, its bootstrap interval, and a test of two systems' difference.

Everything is computed from each item's statistics, so no text is scored twice. For intervals and tests, what the items
of a set share (how rare a word is among all references, for NIST and CIDEr; how many references an item is padded to,
for WebNLG's BLEU) stays as it is in the whole set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefixtune.evaluation.metrics.base import ItemStatistics
from prefixtune.results import Comparison, Score

METHOD = "paired approximate randomization, two-sided"
_MAX_CELLS = 2_000_000
"""Cells of one block of draws: 16 MB, however many items there are."""


@dataclass(frozen=True)
class Measurement:
    """A metric computed once; scores of the set and of its parts, intervals and comparisons follow at little cost.

    Attributes:
        name: The metric's name.
        higher_is_better: False for error rates.
        statistics: What each item contributes to the score.
        remeasure: Measures the items with these indices as a set of their own; needed only where these are not
            independent.
    """

    name: str
    higher_is_better: bool
    statistics: ItemStatistics
    remeasure: Callable[[Sequence[int]], ItemStatistics] | None = None

    def __len__(self) -> int:
        """The number of items."""
        return len(self.statistics.values)

    @property
    def score(self) -> float:
        """The figure of the whole set."""
        return float(self.statistics.total(self.statistics.values.sum(axis=0)))

    def to_score(self, *, level: float | None = None, samples: int = 1000, seed: int = 0) -> Score:
        """The score, with a confidence interval if a level is given (see `bootstrap`)."""
        interval = None if level is None else bootstrap(self, samples=samples, level=level, seed=seed)
        return Score(
            name=self.name,
            score=self.score,
            implementation=self.statistics.implementation,
            higher_is_better=self.higher_is_better,
            interval=interval,
        )

    def part(self, items: Sequence[int]) -> Measurement:
        """The measurement of some of the items, as if there were no others.

        Args:
            items: Their indices; at least one.

        Raises:
            ValueError: There is none, or one is out of range.
        """
        indices = list(items)
        if not indices or min(indices) < 0 or max(indices) >= len(self):
            raise ValueError(f"a part holds at least one item, numbered 0 to {len(self) - 1}; got {indices[:5]}")
        remeasure = self.remeasure
        if remeasure is None or self.statistics.independent:
            statistics = dataclasses.replace(self.statistics, values=self.statistics.values[indices])
            return dataclasses.replace(self, statistics=statistics, remeasure=None)
        return dataclasses.replace(
            self,
            statistics=remeasure(indices),
            remeasure=lambda inner: remeasure([indices[index] for index in inner]),
        )


def bootstrap(measured: Measurement, *, samples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile interval of the score: as many items are drawn with replacement, many times (Koehn 2004).

    Args:
        measured: The metric on all items.
        samples: How many sets of items are drawn; at least 2.
        level: Share of the drawn scores within the interval; between 0 and 1.
        seed: Seed of the draws; equal seeds give equal intervals.

    Raises:
        ValueError: `samples` or `level` is out of range.
    """
    _check_samples(samples)
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is {level}, but must be between 0 and 1")
    count = len(measured)
    scores = []
    for rng, size in _blocks(samples, count, seed):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=size)
        scores += [measured.statistics.total(row) for row in draws @ measured.statistics.values]
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
        ValueError: The metrics or the numbers of items differ, or `samples` is out of range.
    """
    _check_samples(samples)
    if (first.name, len(first)) != (second.name, len(second)):
        raise ValueError(
            f"only one metric on the same items compares; got {first.name} on {len(first)} items and "
            f"{second.name} on {len(second)}"
        )
    one, other = first.statistics.values, second.statistics.values
    total = first.statistics.total
    difference = first.score - second.score
    # Sums of floats in another order differ in the last digits, but equal differences must count as equal.
    threshold = abs(difference) - 1e-12 * max(1.0, abs(first.score), abs(second.score))
    reached = 0
    for rng, size in _blocks(samples, len(first), seed):
        exchanged = rng.integers(0, 2, size=(size, len(first))) @ (other - one)
        for shift in exchanged:
            reached += abs(total(one.sum(axis=0) + shift) - total(other.sum(axis=0) - shift)) >= threshold
    p_value = (reached + 1) / (samples + 1)
    return Comparison(
        name=first.name,
        first=first.score,
        second=second.score,
        difference=difference,
        p_value=p_value,
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


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ValueError(f"samples is {samples}, but must be at least 2")
