"""How far a score may be trusted: intervals by the bootstrap, and a test of two systems by randomization.

Works on what each item adds to a score, so no text is looked at again. What a set of items has in common (how rare a
word is among all references, for NIST and CIDEr) stays that of the whole set.

Knows nothing of any one metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prefixtune.evaluation.metrics.base import Measurement

__all__ = ["METHOD", "Comparison", "bootstrap", "randomize"]


METHOD = "paired approximate randomization, two-sided"
_CELLS = 2_000_000  # of one block of draws: 16 MB, however many items there are


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same items.

    Attributes:
        name: Of the metric.
        first: Its figure for the first system.
        second: Its figure for the second system.
        difference: The first less the second.
        p_value: How often a difference at least as large comes about where the systems' outputs are exchanged at
            random, item by item; never 0.
        samples: The random exchanges tried.
        higher_is_better: False for error rates.
        method: The name of the test.
    """

    name: str
    first: float
    second: float
    difference: float
    p_value: float
    samples: int
    higher_is_better: bool = True
    method: str = METHOD


def bootstrap(measured: Measurement, *, samples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile interval of the score: sets of as many items are drawn with replacement (Koehn 2004).

    Args:
        measured: The metric on all items.
        samples: Sets drawn; at least 2.
        level: Share of the drawn scores within the interval; between 0 and 1.
        seed: Of the draws; equal seeds give equal intervals.

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
        scores += [measured.rows.total(row) for row in draws @ measured.rows.values]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def randomize(first: Measurement, second: Measurement, *, samples: int = 1000, seed: int = 0) -> Comparison:
    """Test whether two systems differ by more than chance (Riezler & Maxwell 2005; Noreen 1989).

    Where both are equally good, it does not matter which of them wrote which output. So outputs are exchanged item by
    item with a fair coin, and the differences that come about so are held against the real one.

    Args:
        first: One system.
        second: The other, by the same metric on the same items.
        samples: Random exchanges; at least 2. The smallest p-value is 1 / (samples + 1).
        seed: Of the coins.

    Raises:
        ValueError: The metrics or the numbers of items differ, or `samples` is out of range.
    """
    _check_samples(samples)
    if (first.name, len(first)) != (second.name, len(second)):
        raise ValueError(
            f"only one metric on the same items compares; got {first.name} on {len(first)} items and "
            f"{second.name} on {len(second)}"
        )
    one, other = first.rows.values, second.rows.values
    total = first.rows.total
    difference = first.score - second.score
    # Sums of floats in another order differ in the last digits: equal must count as equal.
    least = abs(difference) - 1e-12 * max(1.0, abs(first.score), abs(second.score))
    reached = 0
    for rng, size in _blocks(samples, len(first), seed):
        exchanged = rng.integers(0, 2, size=(size, len(first))) @ (other - one)
        for moved in exchanged:
            reached += abs(total(one.sum(axis=0) + moved) - total(other.sum(axis=0) - moved)) >= least
    p_value = (reached + 1) / (samples + 1)
    return Comparison(first.name, first.score, second.score, difference, p_value, samples, first.higher_is_better)


def _blocks(samples: int, count: int, seed: int) -> Iterator[tuple[np.random.Generator, int]]:
    """The draws, cut into blocks that fit into memory."""
    rng = np.random.default_rng(seed)
    size = max(1, _CELLS // count)
    for start in range(0, samples, size):
        yield rng, min(size, samples - start)


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ValueError(f"samples is {samples}, but must be at least 2")
