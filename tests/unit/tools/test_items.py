"""The interval of a difference over test items, against sacrebleu and against draws made one by one."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from tools.items import item_interval, kept_pairs, scores_of_sums
from tools.outputs import Kept


def bleu_rows(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = rng.integers(8, 25, count)
    totals = np.stack([total - order for order in range(4)], axis=1)
    right = (totals * rng.uniform(0.2, 0.8, (count, 1)) * np.array([1, 0.8, 0.6, 0.5])).astype(int)
    return np.concatenate([total[:, None], total[:, None] + 2, right, totals], axis=1).astype(float)


def test_scores_are_sacrebleus() -> None:
    rows = bleu_rows(9, 0)
    rows[3, 4:6], rows[4, 5], rows[5, 2:6] = 0, 0, 0
    for row, score in zip(rows, scores_of_sums(rows), strict=True):
        counts = row.astype(int).tolist()
        expected = BLEU.compute_bleu(counts[2:6], counts[6:], counts[0], counts[1], smooth_method="exp").score
        assert score == pytest.approx(expected, rel=1e-12)
    assert scores_of_sums(np.array([[3.0, 4.0]])) == pytest.approx([0.75])
    with pytest.raises(ValueError, match="3 numbers"):
        scores_of_sums(np.ones((1, 3)))


def test_a_means_interval_is_that_of_the_mean() -> None:
    """Of a mean the bootstrap's interval is the usual one: 1.96 standard errors on either side."""
    rng = np.random.default_rng(1)
    first, second = (np.stack([rng.normal(center, 1, 400), np.ones(400)], axis=1) for center in (1.0, 0.7))
    low, high = item_interval([(first, second)], samples=20_000)
    differences = (first - second)[:, 0]
    error = differences.std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.01
    )


def test_all_runs_get_the_same_items() -> None:
    """Draws by the item, in plain Python; the mean over two pairs, whose noise partly cancels."""
    pairs = [(bleu_rows(60, 2), bleu_rows(60, 3)), (bleu_rows(60, 4), bleu_rows(60, 5))]
    rng, means = random.Random(0), []
    for _ in range(1500):
        items = [rng.randrange(60) for _ in range(60)]
        scores = [[float(scores_of_sums(rows[items].sum(axis=0)[None])[0]) for rows in pair] for pair in pairs]
        means.append(sum(one - other for one, other in scores) / 2)
    means.sort()
    low, high = item_interval(pairs, samples=4000)
    assert (low, high) == pytest.approx((means[37], means[1462]), abs=0.25)
    # The same runs twice are one pair, not twice the evidence.
    assert item_interval([pairs[0]] * 3) == pytest.approx(item_interval(pairs[:1]))


def test_a_part_of_the_test_set_is_picked() -> None:
    kept = Kept({}, ["a", "b", "c"], ["seen", "unseen", "seen"], {}, {"x": [[1, 1], [2, 1], [3, 1]], "y": [[0, 1]] * 3})
    ((one, other),) = kept_pairs(kept, [("x", "y")], "seen")
    assert one.tolist() == [[1, 1], [3, 1]]
    assert len(other) == 2
    assert len(kept_pairs(kept, [("x", "y")])[0][0]) == 3
    assert kept_pairs(kept, [("x", "z")]) == kept_pairs(None, [("x", "y")]) == kept_pairs(kept, [("x", "y")], "z") == []
