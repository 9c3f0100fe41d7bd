"""Student's t for a few paired differences, and Holm's correction for several questions.

For whole degrees of freedom the distribution is a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4), so that no
library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["MeanDifference", "holm", "mean_difference", "t_p_value", "t_quantile"]


_ROUNDING = 1e-12
"""Differences of equal scores may differ by so much."""


@dataclass(frozen=True)
class MeanDifference:
    """The mean of paired differences, by Student's t over the pairs.

    Attributes:
        mean: Of the differences.
        standard_error: Of the mean; None for a single difference, like all that follow.
        interval: The 95 % confidence interval of the mean.
        p_value: Of the hypothesis that the mean is 0, two-sided; None also where all differences are equal, as t is
            not defined there.
        count: How many differences there are.
    """

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    count: int


def mean_difference(differences: Sequence[float], overlap: float = 0.0) -> MeanDifference:
    """The mean of paired differences, with its interval and p-value.

    Samples that share a part of their data vary less among each other than samples of new data would: the variance of
    the mean is then s^2 (1/k + f/(1 - f)), with s^2 the variance of the k differences and f the share that two samples
    have in common (as in Nadeau & Bengio 2003, section 3, where training sets overlap).

    >>> found = mean_difference([1.0, 2.0, 3.0])
    >>> found.mean, [round(end, 3) for end in found.interval], round(found.p_value, 3)
    (2.0, [-0.484, 4.484], 0.074)

    Args:
        differences: At least one; each of its own sample.
        overlap: The expected share of a sample that is in another one, too; below 1.

    Raises:
        ValueError: There is none, or the overlap is not such a share.
    """
    if not differences:
        raise ValueError("a mean difference needs at least one difference; got none")
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap is {overlap}, but must be at least 0 and below 1")
    center, count = mean(differences), len(differences)
    if count == 1:
        return MeanDifference(center, None, None, None, count)
    error = stdev(differences) / math.sqrt(count) * math.sqrt(1 + count * overlap / (1 - overlap))
    half = t_quantile(0.975, count - 1) * error
    are_equal = math.isclose(min(differences), max(differences), rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    p_value = None if are_equal else t_p_value(center / error, count - 1)
    return MeanDifference(center, error, (center - half, center + half), p_value, count)


def t_p_value(t: float, degrees: int) -> float:
    """How likely a value at least as far from 0 as `t` is, on either side.

    >>> round(t_p_value(2.776445, 4), 6)
    0.05

    Args:
        t: The statistic.
        degrees: Degrees of freedom; at least 1.

    Raises:
        ValueError: There are fewer.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom are {degrees}, but must be at least 1")
    angle = math.atan2(abs(t), math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ..., or 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    inside = (2 / math.pi) * (angle + sine * total) if odd else sine * total
    return min(max(1 - inside, 0.0), 1.0)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t stays below with a probability above one half.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764

    Args:
        probability: Above 0.5 and below 1.
        degrees: Degrees of freedom; at least 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0.5 < probability < 1:
        raise ValueError(f"probability is {probability}, but must be above 0.5 and below 1")
    outside, low, high = 2 * (1 - probability), 0.0, 1.0
    while t_p_value(high, degrees) > outside:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_p_value(middle, degrees) > outside else (low, middle)
    return high


def holm(p_values: Sequence[float], questions: int = 0) -> list[float]:
    """P-values of a family of questions, corrected so that any false answer among them stays as rare (Holm 1979).

    The smallest is multiplied by their number, the next one by one less, and so on; none becomes smaller than one
    before it.

    >>> [round(p_value, 3) for p_value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Args:
        p_values: Of the questions that are answered.
        questions: How many are asked; those without an answer count as if their p-value was 1. 0: no more than these.
    """
    asked = max(questions, len(p_values))
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (asked - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
