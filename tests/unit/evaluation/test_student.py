"""Student's t and Holm's correction, against integrals and tables."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from prefixtune.evaluation.metrics.student import holm, mean_difference, t_p_value, t_quantile

# Two-sided quantiles as in every printed table: degrees of freedom -> of 5 % and of 1 %.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 4: (2.776, 4.604), 9: (2.262, 3.250), 30: (2.042, 2.750)}


def integrate(t: float, degrees: int) -> float:
    """The p-value as the density's integral between -t and t, by Simpson's rule."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    points = np.linspace(-t, t, 20_001)
    density = scale * (1 + points**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.ones(len(points))
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return 1 - float(weights @ density) * (points[1] - points[0]) / 3


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_tables(degrees: int) -> None:
    assert [round(t_quantile(p, degrees), 3) for p in (0.975, 0.995)] == list(TABLE[degrees])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 19, 60])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.7, 4.0])
def test_p_values_are_the_integral_of_the_density(t: float, degrees: int) -> None:
    assert t_p_value(t, degrees) == pytest.approx(integrate(t, degrees), abs=1e-9)
    assert t_p_value(-t, degrees) == t_p_value(t, degrees)


def test_one_difference_has_no_spread_and_equal_ones_no_p_value() -> None:
    assert mean_difference([1.5]).interval is mean_difference([1.5]).p_value is None
    # Two runs that happen to differ by as much are no certainty, whatever the last digits of their scores.
    for equal in ([2.0, 2.0], [0.0, 0.0, 0.0], [61.3 - 60.2, 45.4 - 44.3]):
        found = mean_difference(equal)
        assert (found.mean, found.count) == (pytest.approx(equal[0]), len(equal))
        assert found.p_value is None
    with pytest.raises(ValueError, match="at least one"):
        mean_difference([])


def test_samples_that_overlap_give_wider_intervals_that_hold_what_they_promise() -> None:
    """A sum over a pool of which samples share a half: 95 % of the intervals hold the mean over all pools."""
    rng, held = random.Random(0), 0
    for _ in range(2000):
        pool = [rng.gauss(0.0, 1.0) for _ in range(60)]
        found = mean_difference([statistics.fmean(rng.sample(pool, 30)) for _ in range(5)], 0.5)
        assert found.interval is not None
        held += found.interval[0] <= 0.0 <= found.interval[1]
    assert 0.93 < held / 2000 < 0.97
    with pytest.raises(ValueError, match=r"overlap is 1\.0"):
        mean_difference([1.0, 2.0], 1.0)


def test_holm_rejects_what_its_steps_reject() -> None:
    """The corrected p-value is below a level exactly where Holm's own procedure rejects at that level."""
    rng = random.Random(1)
    for _ in range(50):
        p_values = [rng.random() ** 3 for _ in range(rng.randint(1, 7))]
        corrected = holm(p_values)
        for level in (0.01, 0.05, 0.3):
            rejected: set[int] = set()
            for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
                if p_values[index] > level / (len(p_values) - step):
                    break
                rejected.add(index)
            assert {index for index, value in enumerate(corrected) if value <= level} == rejected
    assert holm([]) == []
    # Questions without an answer count as if nothing was found.
    assert holm([0.01, 0.04], 4) == holm([0.01, 0.04, 1.0, 1.0])[:2] == pytest.approx([0.04, 0.12])
    assert holm([0.01, 0.04], 1) == holm([0.01, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("arguments", [(0.5, 3), (1.0, 3), (0.9, 0)])
def test_what_is_out_of_range_is_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        t_quantile(*arguments)
