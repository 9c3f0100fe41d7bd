"""How far a mean difference depends on the test items: a paired bootstrap from the numbers that are stored for each.

Nothing of the data set is needed: the numbers of an item are counts whose sums give corpus BLEU, or a score and a 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from tools.outputs import Kept

__all__ = ["Array", "bleu_parts", "item_interval", "kept_pairs", "scores_of_sums"]


Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
SAMPLES = 2000
_COUNTS = 10
"""Numbers of an item for BLEU: words, those of the closest reference, matches of 1 to 4 words, how many there are."""


def scores_of_sums(sums: Array) -> Array:
    """The scores of several sets of items.

    Args:
        sums: Of the items' numbers, (sets, columns).

    Raises:
        ValueError: They are neither BLEU's nor a mean's.
    """
    if sums.shape[1] == 2:
        return np.asarray(sums[:, 0] / sums[:, 1])
    if sums.shape[1] != _COUNTS:
        raise ValueError(f"an item has {sums.shape[1]} numbers, but BLEU has {_COUNTS} and a mean has 2")
    brevity, precision = bleu_parts(sums)
    return 100 * brevity * precision


def bleu_parts(sums: Array) -> tuple[Array, Array]:
    """The brevity penalty of BLEU, and the geometric mean of its four precisions; BLEU is their product, times 100.

    Args:
        sums: Of the items' numbers for BLEU, (sets, 10).
    """
    words, closest, right, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    missing = right == 0
    # As sacrebleu does (exp): the first order without a match counts as half a match, the next as a quarter.
    precisions = np.where(missing, 0.5 ** np.cumsum(missing, axis=1), right) / np.maximum(total, 1)
    brevity = np.minimum(1.0, np.exp(1 - closest / np.maximum(words, 1)))
    return brevity, np.where(missing.all(axis=1), 0.0, np.exp(np.log(precisions).mean(axis=1)))


def item_interval(
    pairs: Sequence[tuple[Array, Array]], *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean difference over test items: the same items are drawn, with replacement, for all runs.

    Args:
        pairs: Of each run and its counterpart, the items' numbers, (items, columns) each; all of the same items.
        samples: How many sets of items are drawn.
        seed: Of the draws.
    """
    count = len(pairs[0][0])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples).astype(float)
    differences = [scores_of_sums(draws @ first) - scores_of_sums(draws @ second) for first, second in pairs]
    low, high = np.quantile(np.mean(differences, axis=0), [0.025, 0.975])
    return float(low), float(high)


def kept_pairs(kept: Kept | None, runs: Sequence[tuple[str, str]], part: str = "") -> list[tuple[Array, Array]]:
    """The numbers of some runs and of their counterparts, on a part of the test set; empty where any are missing.

    Args:
        kept: What is stored of a study; None: nothing.
        runs: Ids of runs and of their counterparts.
        part: Of the test set; empty: all of it.
    """
    if kept is None or not {name for pair in runs for name in pair} <= kept.statistics.keys():
        return []
    indices = [index for index, name in enumerate(kept.parts or [""] * len(kept.items)) if part in ("", name)]
    if not indices:
        return []

    def numbers(run: str) -> Array:
        return np.array(kept.statistics[run], dtype=float)[indices]

    return [(numbers(run), numbers(other)) for run, other in runs]
