"""Student's t against scipy's."""

from __future__ import annotations

import random

import pytest

from prefixtune.evaluation.metrics.student import mean_difference


def test_scipy_agrees() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for count in (2, 3, 5, 10, 33):
        differences = [rng.gauss(0.7, 1.3) for _ in range(count)]
        found, expected = mean_difference(differences), stats.ttest_1samp(differences, 0.0)
        interval = expected.confidence_interval(0.95)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
        # Of two methods on the same samples it is the paired test.
        other = [rng.random() for _ in range(count)]
        paired = stats.ttest_rel([a + b for a, b in zip(differences, other, strict=True)], other)
        assert found.p_value == pytest.approx(paired.pvalue, rel=1e-7)
