"""The tables of docs/RESULTS.md, each from a stored study or from stored measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from prefixtune.evaluation.metrics import mean_difference
from prefixtune.pages.format import metric_name
from prefixtune.report.results import Cell, Difference, Evaluation, Score, Study
from prefixtune.report.sections.points import varying_factors
from prefixtune.studies.compare import sample_overlap
from prefixtune.studies.kinds import UNTRAINED
from tools.items import bleu_parts
from tools.outputs import Kept

__all__ = ["costs_table", "differences_table", "metrics_table", "progress", "scores_table", "table", "toys_table"]


_NUMBERS = ("num_targets", "prefix_length")
"""Factors that are numbers; all others are words."""


def scores_table(study: Study, kept: Kept | None = None) -> str:
    """A study's scores, one row for each point that has a run: what varied, runs, the rate among those tried, scores,
    the words of a text, BLEU's brevity penalty and precision, losses, and how many numbers are trained and stored. A
    figure that not all of these runs have says how many do.

    Args:
        study: The study.
        kept: What its runs wrote, which scores by n-grams punish for being short; None: it is not kept.
    """
    outputs = {} if kept is None else kept.outputs
    factors_of_bleu = _bleu_factors(kept)
    points, factors = _done_points(study), varying_factors(study)
    planned = _planned(study)
    # A run may lack one: METEOR needs Java, in a given time.
    metrics = list(dict.fromkeys(name for runs in points.values() for _, each in runs for name in each.scores))
    groups = sorted({name for runs in points.values() for name in _group_scores(runs[0][1])})
    head = [*factors, "runs", "learning rate (tried)", *(name.upper() for name in metrics)]
    head += [f"BLEU, {name}" for name in groups] + ["words"] * bool(outputs)
    head += ["brevity", "precision"] * bool(factors_of_bleu)
    head += ["development loss", "trained", "stored", "bytes"]
    rows = []
    for point, runs in sorted(points.items(), key=lambda item: _order(item[1][0][0], study.factors, factors)):
        first, evaluations = runs[0][0], [evaluation for _, evaluation in runs]
        row = [str(first.factors.get(name, "")) for name in factors]
        row += [_count(len(runs), planned[point]), _rates(study.tuning.get(point))]
        row += [_score([each.scores.get(name) for each in evaluations]) for name in metrics]
        in_groups = [_group_scores(evaluation) for evaluation in evaluations]
        row += [_score([scores.get(name) for scores in in_groups]) for name in groups]
        if outputs:
            row.append(_words([outputs[cell.id] for cell, _ in runs if cell.id in outputs]))
        if factors_of_bleu:
            both = [factors_of_bleu[cell.id] for cell, _ in runs if cell.id in factors_of_bleu]
            row += [
                f"{mean(values):.{digits}f}" for values, digits in zip(zip(*both, strict=True), (3, 1), strict=True)
            ]
        losses = [cell.figures["dev_loss"] for cell, _ in runs if "dev_loss" in cell.figures]
        row.append(f"{mean(losses):.3f}{_fewer(len(losses), len(runs))}" if losses else "")
        for kind in ("trained_parameters", "stored_parameters", "file_bytes"):
            row.append(_range([cell.figures[kind] for cell, _ in runs if kind in cell.figures]))
        rows.append(row)
    return "\n\n".join(filter(None, [progress(study), table(head, rows) if rows else ""]))


def progress(study: Study) -> str:
    """What of a study is still to be done; empty: it is finished."""
    done = [cell for cell in study.cells if cell.status == "done"]
    if len(done) == len(study.cells):
        return ""
    text = f"**{'Partly run' if done else 'Not run yet'}: {len(done)} of {len(study.cells)} runs are done.**"
    begun = {cell.point for cell in done}
    missing = list(dict.fromkeys(cell.point for cell in study.cells if cell.point not in begun))
    failed = [cell.id for cell in study.cells if cell.status == "failed"]
    text += f" Without any run: {', '.join(missing)}." if missing and done else ""
    return text + (f" Failed: {', '.join(failed)}." if failed else "")


def differences_table(study: Study, kept: Kept | None = None) -> str:
    """How far a study's points are from their counterparts in score, precision and development loss, a row for each.

    Args:
        study: The study.
        kept: What its runs wrote; None: it is not kept.
    """
    if not study.differences:
        return "None yet."
    decimals, counts, precisions = _decimals(study), _planned(study), _precisions(kept)
    losses = {cell.id: cell.figures["dev_loss"] for cell in study.cells if "dev_loss" in cell.figures}
    # One run that is not trained has a difference from every run of its counterpart.
    planned = {
        p.point: counts.get(p.reference if p.point.startswith(UNTRAINED) else p.point, 0) for p in study.differences
    }
    has_parts = any(point.part for point in study.differences)
    is_corrected = any(point.corrected_p_value is not None for point in study.differences)
    head = [f"{metric_name(study.metric)} of", "less that of", *["test items"] * has_parts, "each run (p)"]
    head += ["mean ± standard error", *["95 % interval", "p", "p, corrected"] * is_corrected]
    head += ["precision (95 % interval)"] * bool(precisions) + ["development loss (95 % interval)"] * bool(losses)
    rows = []
    for point in study.differences:
        runs = [
            f"{difference:+.{decimals}f}" + (f" ({p_value:.3f})" if p_value is not None else "")
            for difference, p_value in zip(point.differences, point.p_values, strict=True)
        ]
        if len(runs) < planned[point.point]:
            runs.append(f"{_count(len(runs), planned[point.point])} runs")
        error = point.standard_error
        spread = f"{point.mean:+.{decimals}f} ± {error:.{decimals}f}" if error is not None else ""
        row = [point.point, point.reference, *[point.part or "all"] * has_parts, "; ".join(runs), spread]
        if is_corrected:
            ends, p_values = point.interval, (point.p_value, point.corrected_p_value)
            row.append("" if ends is None else f"{ends[0]:+.{decimals}f} to {ends[1]:+.{decimals}f}")
            row += ["" if p_value is None else f"{p_value:.3f}" for p_value in p_values]
        if precisions:
            row.append("" if point.part else _mean_difference(study, point, precisions, 1))
        if losses:
            row.append("" if point.part else _mean_difference(study, point, losses, 3))
        rows.append(row)
    return table(head, rows)


def metrics_table(study: Study) -> str:
    """How far a study's trained points are from their counterparts by each metric, where there are several samples."""
    scores: dict[str, dict[str, float]] = {}
    for runs in _done_points(study).values():
        for cell, evaluation in runs:
            for name, score in evaluation.scores.items():
                if score.score is not None:
                    scores.setdefault(name, {})[cell.id] = score.score
    rows = []
    for point in study.differences:
        if not point.part and point.interval is not None and not point.point.startswith(UNTRAINED):
            digits = {name: 1 if max(values.values()) > 10 else 3 for name, values in scores.items()}
            found = [_mean_difference(study, point, values, digits[name]) for name, values in scores.items()]
            rows.append([point.point, point.reference, *found])
    return table(["score of", "less that of", *(metric_name(name) for name in scores)], rows)


def _mean_difference(study: Study, point: Difference, values: Mapping[str, float], digits: int) -> str:
    """A figure of a point's runs less that of their counterparts: the mean, and its 95 % interval over samples.

    Args:
        study: Where the runs are.
        point: The point and its counterpart.
        values: The figure by a run's id; runs without one are left out.
        digits: Of the texts.
    """
    by_sample: dict[str, list[float]] = {}
    for pair in study.comparisons.pairs:
        run, _, repetition = pair.run.rpartition("-subset")
        reference, _, of_reference = pair.reference.rpartition("-subset")
        is_asked = (run, reference, pair.part) == (point.point, point.reference, "")
        if is_asked and pair.run in values and pair.reference in values:
            # One run that is not trained stands against every run of its counterpart.
            sample = (of_reference if run.startswith(UNTRAINED) else repetition).partition("-seed")[0]
            by_sample.setdefault(sample, []).append(values[pair.run] - values[pair.reference])
    if not by_sample:
        return ""
    sizes = [int(cell.factors.get("num_targets") or 0) for cell in study.cells if cell.point == point.reference]
    found = mean_difference(
        [mean(differences) for differences in by_sample.values()], sample_overlap(max(sizes), study.train_targets)
    )
    ends = "" if found.interval is None else " ({:+.{d}f} to {:+.{d}f})".format(*found.interval, d=digits)
    return f"{found.mean:+.{digits}f}{ends}"


def _bleu_factors(kept: Kept | None) -> dict[str, tuple[float, float]]:
    """The brevity penalty of each run and the precision, in percent; empty if the metric is another one."""
    if kept is None or kept.study["metric"] != "bleu":
        return {}
    found = {
        run: bleu_parts(np.sum(np.array(rows, dtype=float), axis=0, keepdims=True))
        for run, rows in kept.statistics.items()
    }
    return {run: (float(brevity[0]), 100 * float(precision[0])) for run, (brevity, precision) in found.items()}


def _precisions(kept: Kept | None) -> dict[str, float]:
    return {run: precision for run, (_, precision) in _bleu_factors(kept).items()}


def toys_table(studies: Sequence[Study]) -> str:
    """The share of exact answers on each toy task, a column for each method."""
    points: dict[str, dict[str, list[Score | None]]] = {}
    for study in studies:
        for point, runs in _done_points(study).items():
            scores = [evaluation.scores.get(study.metric) for _, evaluation in runs]
            points.setdefault(study.task, {}).setdefault(point, []).extend(scores)
    columns = list(dict.fromkeys(point for scores in points.values() for point in scores))
    rows = [[task, *(_score(scores[c]) if c in scores else "" for c in columns)] for task, scores in points.items()]
    missing = [study.task for study in studies if progress(study)]
    text = f"**Partly run.** Not finished: {', '.join(missing)}.\n\n" if missing else ""
    return text + table(["task", *columns], rows)


def costs_table(measured: Mapping[str, Any] | None) -> str:
    """Time and memory of a training step of each method, and what they were measured on.

    Args:
        measured: What `python -m bench.training.methods` wrote; None: nothing.
    """
    if measured is None:
        return "Not measured yet: `make bench-methods`, on a machine with nothing else running."
    machine, versions, rows = measured["machine"], measured["versions"], measured["methods"]
    first = next(iter(rows.values()))["step_seconds"]
    others = measured.get("cores_used_by_others")
    busy = "" if others is None else f", {others:.2f} cores busy with other work"
    where = (
        f"`{measured['command']}`, {measured['date'][:10]}: {machine['processor']}, {machine['cores']} cores, "
        f"{measured['threads']} threads{busy}; torch {versions['torch']}. Batches of {measured['batch_size']} pairs of "
        "E2E; the median of the steps."
    )
    lines = [
        [
            name,
            f"{row['trained']:,}",
            f"{row['step_seconds']:.2f}",
            f"{row['step_seconds'] / first:.2f}",
            f"{row['peak_memory_mib']:,.0f}",
        ]
        for name, row in rows.items()
    ]
    head = ["method", "trained", "seconds a step", "of the first's", "peak memory, MiB"]
    return f"{where}\n\n{table(head, lines)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _done_points(study: Study) -> dict[str, list[tuple[Cell, Evaluation]]]:
    points: dict[str, list[tuple[Cell, Evaluation]]] = {}
    for cell in study.cells:
        if cell.status == "done" and cell.run is not None and cell.run.evaluation is not None:
            points.setdefault(cell.point, []).append((cell, cell.run.evaluation))
    return points


def _planned(study: Study) -> dict[str, int]:
    """How many runs each point has, done or not."""
    counts: dict[str, int] = {}
    for cell in study.cells:
        counts[cell.point] = counts.get(cell.point, 0) + 1
    return counts


def _count(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"


def _words(runs: Sequence[Sequence[str]]) -> str:
    """How long the texts of some runs are on average, and the shortest and the longest average of one."""
    lengths = [mean(len(text.split()) for text in texts) for texts in runs]
    if not lengths:
        return "not kept"
    spread = f" ({min(lengths):.1f} to {max(lengths):.1f})" if len(lengths) > 1 else ""
    return f"{mean(lengths):.1f}{spread}"


def _fewer(count: int, runs: int) -> str:
    """Of how many runs a figure is; empty: of all."""
    return "" if count == runs else f", {_count(count, runs)} runs"


def _range(values: Sequence[float]) -> str:
    """Whole numbers of several runs: a prefix from examples is as long as the examples of its sample."""
    ends = list(dict.fromkeys([min(values), max(values)])) if values else []
    return " to ".join(f"{value:,.0f}" for value in ends)


def _decimals(study: Study) -> int:
    """How many a difference has: scores of 0 to 1 need more."""
    scores = [cell.run.evaluation.scores for cell in study.cells if cell.run is not None and cell.run.evaluation]
    values = [score.score for by_name in scores if (score := by_name.get(study.metric)) and score.score is not None]
    return 1 if max(values, default=0.0) > 10 else 3


def _group_scores(evaluation: Evaluation) -> dict[str, Score]:
    """BLEU of seen and unseen categories, where the data distinguishes them."""
    groups = evaluation.groups.get("seen", {})
    return {name: group.scores["bleu"] for name, group in groups.items() if "bleu" in group.scores}


def _order(cell: Cell, *lists: Sequence[str]) -> list[Any]:
    """By lists of factors, one after the other; in each, numbers before words."""
    order: list[Any] = []
    for factors in lists:
        order += [cell.factors.get(name, 0) for name in factors if name in _NUMBERS]
        order += [str(cell.factors.get(name, "")) for name in factors if name not in _NUMBERS]
    return order


def _rates(tuning: dict[str, Any] | None) -> str:
    if tuning is None:
        return ""
    tried = sorted(float(rate) for rate in tuning["learning_rate"])
    edge = ", at the edge" if len(tried) > 1 and tuning["chosen"] in (tried[0], tried[-1]) else ""
    return f"{tuning['chosen']:g} ({', '.join(f'{rate:g}' for rate in tried)}{edge})"


def _score(scores: Sequence[Score | None]) -> str:
    """One run: its score and interval; several: mean, standard deviation and range.

    Args:
        scores: Of each run; None: it has none.
    """
    measured = [(score.score, score.interval) for score in scores if score is not None and score.score is not None]
    if not measured:
        return "not measured"
    values, fewer = [value for value, _ in measured], _fewer(len(measured), len(scores))
    digits = 1 if max(values) > 10 else 2 if max(values) > 1 else 3
    if len(values) > 1:
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({spread}){fewer}"
    interval = measured[0][1]
    text = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{values[0]:.{digits}f}{text}{fewer}"
