"""Differences of a study's points from its first: paired by sample, with intervals and Holm's correction.

Each sample of a point is compared with the same sample of the first point, of the same size. The interval and the
p-value of the mean difference are Student's. Where there is one sample, its outputs are compared item by item, by
paired randomization. P-values are corrected over all comparisons of the study (Holm 1979). They say nothing of another
model or task.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from prefixtune.data import TASKS
from prefixtune.evaluation.metrics import measure, randomize
from prefixtune.results import EVALUATION_FILE, OUTPUTS_FILE, Evaluation, OutputRow
from research.study import Cell, Study, cells


def load(study: Study) -> pd.DataFrame:
    """A row for each run that is done: `point`, `size`, `sample`, its scores by metric, and what the training took."""
    rows = []
    for cell in cells(study):
        path = Path(study.output) / cell.name / EVALUATION_FILE
        if path.exists():
            found = Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
            training = (found.model_extra or {}).get("training") or {}
            scores = {name: score.score for name, score in found.scores.items()}
            rows.append({"point": cell.point, "size": cell.size, "sample": cell.sample, **scores, **training})
    return pd.DataFrame(rows, columns=None if rows else ["point", "size", "sample"])


def compare(study: Study, metric: str) -> pd.DataFrame:
    """Every point against the first one, where both are done.

    Returns:
        Rows with `point`, `size`, `samples`, `difference` (the point minus the first, the mean), `low` and `high` (its
        95 % interval), `p_value`, and `corrected`.
    """
    runs, first = load(study), next(iter(study.points))
    rows = []
    for size in study.sizes:
        table = runs[runs["size"] == size].pivot(index="sample", columns="point", values=metric)
        for point in [point for point in study.points if point != first and {point, first} <= {*table.columns}]:
            differences = (table[point] - table[first]).dropna()
            low, high, p_value = _test(differences)
            if len(differences) == 1:
                p_value = _by_item(study, metric, *(Cell(name, size, differences.index[0]) for name in (point, first)))
            rows.append((point, size, len(differences), differences.mean(), low, high, p_value))
    return _corrected(rows, ["point", "size"])


def compare_over_sizes(study: Study, metric: str) -> pd.DataFrame:
    """Every point against the first one, by the mean over all sizes: one difference for each sample.

    Samples that are not done at every size are left out.

    Returns:
        As `compare`, without `size`.
    """
    runs, first = load(study), next(iter(study.points))
    table = runs.pivot(index="sample", columns=["point", "size"], values=metric)
    rows = []
    for point in study.points:
        columns = [(name, size) for name in (point, first) for size in study.sizes]
        if point == first or not {*columns} <= {*table.columns}:
            continue
        whole = table[columns].dropna()
        differences = whole[point].mean(axis=1) - whole[first].mean(axis=1)
        rows.append((point, len(differences), differences.mean(), *_test(differences)))
    return _corrected(rows, ["point"])


def _test(differences: pd.Series[float]) -> tuple[float, float, float]:
    """Student's interval of the mean, and the p-value; not numbers for fewer than two samples."""
    from scipy import stats

    if len(differences) > 1 and differences.std() < 1e-12:
        return differences.mean(), differences.mean(), math.nan
    if len(differences) > 1:
        test = stats.ttest_1samp(differences, 0.0)
        return (*test.confidence_interval(), test.pvalue)
    return math.nan, math.nan, math.nan


def _corrected(rows: list[tuple[Any, ...]], names: list[str]) -> pd.DataFrame:
    """The rows, with p-values corrected over all of them."""
    from statsmodels.stats.multitest import multipletests

    found = pd.DataFrame(rows, columns=[*names, "samples", "difference", "low", "high", "p_value"])
    found = found[found["samples"] > 0].reset_index(drop=True)
    # A question without an answer is one that was asked.
    corrected = multipletests(found["p_value"].fillna(1.0), method="holm")[1] if len(found) else []
    return found.assign(corrected=pd.Series(corrected, dtype=float).where(found["p_value"].notna()))


def _by_item(study: Study, metric: str, *pair: Cell) -> float:
    """The p-value of the difference of two runs' outputs; not a number: the metric is none of texts."""
    task = TASKS[study.task]
    if task.kind != "generation":
        return math.nan
    measured = []
    for cell in pair:
        lines = (Path(study.output) / cell.name / OUTPUTS_FILE).read_text(encoding="utf-8").splitlines()
        rows = [OutputRow(**json.loads(line)) for line in lines]
        texts = [row.output for row in rows], [row.references for row in rows]
        measured.append(measure(*texts, protocol=task.protocol, metrics=[metric])[metric])
    return randomize(*measured).p_value
