"""How much a study's runs differ: each run is compared with its counterpart, test item by test item.

A run's counterpart is the run of the first method, length or start, whatever the study varies, on the same sample, seed
and size. What is not trained has one run, which is compared with the first method's runs of every sample and size.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefixtune.data import TASKS
from prefixtune.errors import DataError
from prefixtune.evaluation.metrics import Measurement, holm, mean_difference, measure, randomize
from prefixtune.evaluation.metrics.significance import METHOD
from prefixtune.evaluation.records import EVALUATION_FILE, OUTPUTS_FILE
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.grid import Cell, plan
from prefixtune.studies.records import COMPARISONS_FILE, changed_settings, read_json_file, read_outcome, read_study
from prefixtune.utils.files import write_text

__all__ = ["SAMPLES", "compare_runs", "counterparts", "sample_overlap", "write_comparisons"]


SAMPLES = 1000
"""Random exchanges of a test; the smallest p-value is one in as many and one."""
_PARTED_BY = "seen"
"""The grouping whose parts are compared, too: categories that are in the training set, and those that are not."""

_PairKey = tuple[str, str, str]
"""A run, its counterpart, and the part of the test set; empty: all of it."""


def write_comparisons(config: StudyConfig, cells: Sequence[Cell]) -> None:
    """Write down how the runs that are done differ, unless the study has become a larger one."""
    stored = read_study(config)
    if stored is None or changed_settings(config, stored):
        return
    path, task = config.folder / COMPARISONS_FILE, TASKS[config.task]
    before = read_json_file(path, "pairs") if path.exists() else None
    done, available = read_outcome(config, cells).done, stored.get("train_targets", 0)
    facts = compare_runs(config, task.metrics[0], task.protocol, done, before, available)
    write_text(path, json.dumps(facts, indent=1) + "\n")


def counterparts(config: StudyConfig) -> Iterator[tuple[Cell, Cell]]:
    """Every run of a study that has a counterpart, and its counterpart.

    >>> study = StudyConfig(name="low-data", sizes=[50, 100], subsets=1, seeds=1)
    >>> [(run.id, other.id) for run, other in counterparts(study)][0]
    ('full-n50-subset0-seed0', 'prefix-n50-P10-task-subset0-seed0')
    """
    cells = plan(config)
    for cell in cells:
        for size in [cell.num_targets] if cell.trains else config.sizes:
            group = _reference_group(config, cell, size, cells)
            for other in cells:
                is_same = not cell.trains or (other.subset, other.seed) == (cell.subset, cell.seed)
                if other.group == group and is_same and other != cell:
                    yield cell, other


def _reference_group(config: StudyConfig, cell: Cell, size: int, cells: Sequence[Cell]) -> str:
    """The group of a size that a cell's group is compared with; empty where there is none."""
    for other in cells:
        # The first factor is what is compared; the others must be the same, where a method has them.
        same = [other.trains, other.num_targets == size, other.backbone == cell.backbone]
        if "prefix_length" in config.kind.factors[1:]:
            same.append(0 in (cell.prefix_length, other.prefix_length) or cell.prefix_length == other.prefix_length)
        if all(same):
            return other.group
    return ""


def compare_runs(
    config: StudyConfig,
    metric: str,
    protocol: str,
    done: Collection[str],
    before: Mapping[str, Any] | None = None,
    available: int = 0,
) -> dict[str, Any]:
    """The differences between a study's runs, as `comparisons.json` has them.

    Args:
        config: The study.
        metric: A name of `prefixtune.evaluation.metrics.METRICS`.
        protocol: How texts are prepared for it.
        done: Ids of the runs that are done; the others are left out.
        before: An earlier result. Its tests are kept where the scores are still the same, so that outputs may be gone
            by now.
        available: Targets that samples are drawn from, so that what they share counts in the intervals; 0: unknown.

    Returns:
        `pairs`: of each run and its counterpart, on the whole test set and on its seen and unseen parts: the difference
        (the run less its counterpart), and the p-value of paired approximate randomization; None where outputs are
        missing. `points`: all repetitions of a point together: the mean difference, its standard error and 95 %
        interval over the samples of the training set (Student's t, wider where samples overlap; several seeds of a
        sample count once, by their mean), or over the seeds of a single sample, and the p-value of the mean; of one
        run, that of its pair; None where all differences are equal. `corrected_p_value` is by Holm's correction over
        all points that the study has on the same part of the test set, done or not.
    """
    settings = {"metric": metric, "test": METHOD, "samples": SAMPLES}
    is_comparable = before is not None and all(before.get(key) == value for key, value in settings.items())
    old_pairs = {_key(pair): pair for pair in before["pairs"]} if before and is_comparable else {}
    folder = config.folder / "cells"

    @cache
    def outputs_of(cell: Cell) -> _MeasuredOutputs | None:
        return _measure_outputs(folder / cell.id, metric, protocol)

    pairs: list[dict[str, Any]] = []
    by_point: dict[_PairKey, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, other in counterparts(config):
        if not {cell.id, other.id} <= set(done):
            continue
        ours, theirs = (_scores(folder / each.id, metric) for each in (cell, other))
        for part in [name for name in ours if name in theirs]:
            (score, num_items), (reference_score, _) = ours[part], theirs[part]
            pair: dict[str, Any] = {"run": cell.id, "reference": other.id, "part": part, "num_items": num_items}
            pair |= {"score": score, "reference_score": reference_score, "difference": score - reference_score}
            old = old_pairs.get(_key(pair), {})
            p_value = old.get("p_value") if all(old.get(key) == value for key, value in pair.items()) else None
            if p_value is None:
                p_value = _p_value(outputs_of(cell), outputs_of(other), part, (score, reference_score))
            pairs.append({**pair, "p_value": p_value})
            # What is not trained has no sample of its own.
            trained = cell if cell.trains else other
            by_point.setdefault((cell.group, other.group, part), []).append((trained, pairs[-1]))
    points = [
        {"point": point, "reference": reference, "part": part, **_summary(repetitions, available)}
        for (point, reference, part), repetitions in by_point.items()
    ]
    # Rows that are still to come count as questions, or a part of a study would be surer than the whole.
    questions = len({(cell.group, other.group) for cell, other in counterparts(config)})
    for part in dict.fromkeys(point["part"] for point in points):
        family = [point for point in points if point["part"] == part and point["p_value"] is not None]
        for point, p_value in zip(family, holm([point["p_value"] for point in family], questions), strict=True):
            point["corrected_p_value"] = p_value
    return {**settings, "pairs": pairs, "points": points}


def sample_overlap(num_targets: int, available: int) -> float:
    """The share that two samples of so many targets have in common on average; 0 where all are taken, or it is unknown.

    >>> sample_overlap(500, 2000), sample_overlap(0, 2000), sample_overlap(500, 0)
    (0.25, 0.0, 0.0)
    """
    return num_targets / available if num_targets < available else 0.0


def _summary(repetitions: Sequence[tuple[Cell, Mapping[str, Any]]], available: int) -> dict[str, Any]:
    """What pairs say together, each with the run that has a sample of the training set."""
    pairs = [pair for _, pair in repetitions]
    differences, p_values = ([pair[key] for pair in pairs] for key in ("difference", "p_value"))
    by_sample: dict[int, list[float]] = {}
    for cell, pair in repetitions:
        by_sample.setdefault(cell.subset, []).append(pair["difference"])
    if len(by_sample) == 1:
        # Several seeds of one sample say nothing of other samples.
        found = mean_difference(differences)
    else:
        shared = sample_overlap(repetitions[0][0].num_targets, available)
        found = mean_difference([statistics.fmean(values) for values in by_sample.values()], shared)
    return {
        "num_runs": len(pairs),
        "differences": differences,
        "p_values": p_values,
        "mean": found.mean,
        "standard_error": found.standard_error,
        "interval": None if found.interval is None else list(found.interval),
        "p_value": p_values[0] if len(pairs) == 1 else found.p_value,
        "corrected_p_value": None,
    }


def _key(pair: Mapping[str, Any]) -> _PairKey:
    return str(pair.get("run")), str(pair.get("reference")), str(pair.get("part"))


def _scores(folder: Path, metric: str) -> dict[str, tuple[float, int]]:
    """Score and number of items of a run: of the whole test set (its name is empty), and of its parts."""
    path = folder / EVALUATION_FILE
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read: {error}.", hint="delete the run's folder, and run the study again."
        ) from error
    parts = {"": facts, **facts.get("groups", {}).get(_PARTED_BY, {})}
    return {
        name: (part["scores"][metric]["score"], part["num_examples"])
        for name, part in parts.items()
        if isinstance(part["scores"].get(metric, {}).get("score"), int | float)
    }


@dataclass(frozen=True)
class _MeasuredOutputs:
    """A run's outputs, scored one by one.

    Attributes:
        measurement: Of the metric.
        items: Source and references of each output.
        parts: The part of the test set that each output belongs to.
    """

    measurement: Measurement
    items: tuple[tuple[str, tuple[str, ...]], ...]
    parts: tuple[str, ...]


def _measure_outputs(folder: Path, metric: str, protocol: str) -> _MeasuredOutputs | None:
    """Score a run's outputs; None where they are missing or broken."""
    try:
        lines = (folder / OUTPUTS_FILE).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        items = tuple((row["source"], tuple(row["references"])) for row in rows)
        outputs, parts = [row["output"] for row in rows], tuple(row["groups"].get(_PARTED_BY, "") for row in rows)
        references = [references for _, references in items]
        measurement = measure(outputs, references, protocol=protocol, metrics=[metric], left_out={}).get(metric)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if measurement is None else _MeasuredOutputs(measurement, items, parts)


def _p_value(
    ours: _MeasuredOutputs | None, theirs: _MeasuredOutputs | None, part: str, expected: tuple[float, float]
) -> float | None:
    """The p-value of a difference; None where outputs are missing, are of other items, or are not those scored."""
    if ours is None or theirs is None or ours.items != theirs.items:
        return None
    first, second = ours.measurement, theirs.measurement
    if part:
        indices = [index for index, name in enumerate(ours.parts) if name == part]
        first, second = first.part(indices), second.part(indices)
    if not all(math.isclose(one.score, score) for one, score in zip((first, second), expected, strict=True)):
        return None
    return randomize(first, second, samples=SAMPLES).p_value
