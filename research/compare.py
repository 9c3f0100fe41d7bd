"""Differences of a study's points from its first: paired by sample, with intervals and Holm's correction.

    python -m research.compare research/studies/low_data.toml [METRIC]

Each sample of a point is compared with the same sample of the first point, of the same size. The interval and the
p-value of the mean difference are Student's; p-values are corrected over all comparisons of the study. They say nothing
of another model or task.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from research.study import Cell, Study

__all__ = ["Difference", "compare", "holm", "main"]


@dataclass(frozen=True)
class Difference:
    """A point against the first one, at one size.

    Attributes:
        point: Its name.
        size: Of the training set.
        differences: Of each sample: the point's score minus the first point's.
        interval: Of the mean, 95 %; None: there is one sample.
        p_value: Of the mean; None likewise, or if all differences are equal.
        corrected: The p-value after Holm's correction.
    """

    point: str
    size: int
    differences: tuple[float, ...]
    interval: tuple[float, float] | None
    p_value: float | None
    corrected: float | None = None


def score(study: Study, cell: Cell, metric: str) -> float | None:
    """The score of a run; None: it is not done."""
    path = Path(study.output) / cell.name / "evaluation.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["scores"][metric]["score"]) if path.exists() else None


def compare(study: Study, metric: str) -> list[Difference]:
    """Every point against the first one, where both are done."""
    first, *others = study.points
    found = []
    for size in study.sizes:
        for point in others:
            pairs = [
                (score(study, Cell(point, size, number), metric), score(study, Cell(first, size, number), metric))
                for number in range(study.samples)
            ]
            differences = tuple(one - other for one, other in pairs if one is not None and other is not None)
            if differences:
                found.append(Difference(point, size, differences, *_test(differences)))
    tested = [each.p_value for each in found if each.p_value is not None]
    corrected = iter(holm(tested, len(found)))
    return [each if each.p_value is None else _with(each, next(corrected)) for each in found]


def _with(each: Difference, corrected: float) -> Difference:
    return Difference(each.point, each.size, each.differences, each.interval, each.p_value, corrected)


def _test(differences: Sequence[float]) -> tuple[tuple[float, float] | None, float | None]:
    """The interval and the p-value of a mean of differences."""
    if len(differences) < 2:
        return None, None
    if max(differences) - min(differences) < 1e-12:
        return (differences[0], differences[0]), None
    from scipy import stats

    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval()
    return (float(interval.low), float(interval.high)), float(test.pvalue)


def holm(p_values: Sequence[float], questions: int = 0) -> list[float]:
    """P-values of a family of questions, corrected so that any false answer among them stays as rare (Holm 1979).

    >>> [round(p_value, 3) for p_value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Args:
        p_values: Of the questions that are answered.
        questions: How many are asked; those without an answer count as if their p-value was 1.
    """
    asked, corrected, largest = max(questions, len(p_values)), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (asked - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def main(arguments: Sequence[str]) -> None:
    """Print a table in Markdown."""
    study = Study(**tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    metric = arguments[1] if len(arguments) > 1 else "bleu"
    print(f"| point | targets | samples | {metric}: difference from {next(iter(study.points))} | 95 % interval | p |")
    print("|---|---|---|---|---|---|")
    for each in compare(study, metric):
        interval = "" if each.interval is None else f"{each.interval[0]:.3f} to {each.interval[1]:.3f}"
        p_value = "" if each.corrected is None else f"{each.corrected:.4f}"
        numbers = f"{len(each.differences)} | {mean(each.differences):+.3f} | {interval} | {p_value}"
        print(f"| {each.point} | {each.size or 'all'} | {numbers} |")


if __name__ == "__main__":
    main(sys.argv[1:])
