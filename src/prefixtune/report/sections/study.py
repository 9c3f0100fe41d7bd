"""A study's part of a report, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.report.document import Block, Column, Details, Headline, Listing, Section, Table, Text, Value
from prefixtune.report.format import count, decimals_for, duration, fixed, metric_name, plain, words
from prefixtune.report.results import Cell, Study
from prefixtune.report.sections.axis import axis_section
from prefixtune.report.sections.details import losses_section, outputs_section, settings_section
from prefixtune.report.sections.differences import differences_section
from prefixtune.report.sections.groups import groups_section
from prefixtune.report.sections.points import cell_figures, name_factors, representatives, study_systems
from prefixtune.report.sections.systems import headline, main_metric, scores_section
from prefixtune.report.sections.tuning import tuning_section

__all__ = ["Part", "study_part"]


_MOST_NAMES = 8


@dataclass(frozen=True)
class Part:
    """One subject of a report.

    Attributes:
        facts: What was run, on what and when.
        warnings: Why the figures may be incomplete.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    headline: Headline | None
    sections: Sequence[Section]


def study_part(study: Study, identity: str) -> Part:
    """Everything in a study's folder.

    Args:
        study: As it was read.
        identity: Prefix of the ids in the charts.
    """
    systems = study_systems(study)
    main = main_metric(systems, study.metric) or study.metric
    shown, at = representatives(systems, study.axis)
    name = ", ".join(words(factor) for factor in name_factors(study)) or "system"
    sections = [
        _unfinished(study),
        scores_section(systems, main, study.axis, name),
        differences_section(study, systems),
        axis_section(systems, study.axis, main, identity),
        Section("Left out or made smaller", [Listing(study.cut)]) if study.cut else None,
        groups_section(shown, main, identity),
        tuning_section(study.tuning),
        losses_section(systems, identity),
        outputs_section(shown, f"Each system{at}: its first finished run." if len(systems) > 1 else ""),
        settings_section(systems, _origin(study), study.config),
        Section("Cells", [Details(f"All {len(study.cells)} cells", [_cells_table(study.cells, main)])]),
    ]
    return Part(
        title=study.title or f"Study {study.name}",
        facts=_facts(study),
        warnings=_warnings(study, main),
        headline=headline(shown, main, at),
        sections=[section for section in sections if section is not None],
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    done = sum(cell.status == "done" for cell in study.cells)
    data = dict.fromkeys(
        f"{count(evaluation.num_examples)} examples of {evaluation.data}"
        for cell in study.cells
        if cell.run is not None and (evaluation := cell.run.evaluation) is not None
    )
    left_out = f"{len(study.cut)} {'thing' if len(study.cut) == 1 else 'things'}, listed below" if study.cut else ""
    facts = [
        ("task", study.task),
        ("backbone", study.backbone),
        ("scored on", "; ".join(data) if len(data) <= 3 else f"{len(data)} files"),
        ("varied", ", ".join(words(factor) for factor in study.factors)),
        ("cells", f"{done} of {len(study.cells)} done"),
        ("budget", "" if study.budget_minutes is None else f"{duration(60 * study.budget_minutes)} for each process"),
        ("left out", left_out),
        ("date", study.date),
    ]
    return [(name, text) for name, text in facts if text]


def _origin(study: Study) -> list[tuple[str, str]]:
    facts = [
        ("command", study.command),
        ("folder", str(study.path)),
        ("machine", _in_one_line(study.machine)),
        ("version", _in_one_line(study.versions)),
    ]
    return [(name, text) for name, text in facts if text]


def _in_one_line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{words(key)} {plain(value)}" for key, value in values.items() if value not in (None, ""))


def _warnings(study: Study, main: str) -> list[str]:
    counts = {status: sum(cell.status == status for cell in study.cells) for status in ("done", "failed", "waiting")}
    warnings = []
    if counts["done"] < len(study.cells):
        rest = [f"{counts[s]} {word}" for s, word in (("failed", "failed"), ("waiting", "wait")) if counts[s]]
        warnings.append(
            f"This study is unfinished: {counts['done']} of {len(study.cells)} cells are done, {', '.join(rest)}. "
            "What follows is about those that are done."
        )
    unscored = [cell.id for cell in study.cells if cell.status == "done" and _score(cell, main) is None]
    if unscored:
        more = f" and {len(unscored) - _MOST_NAMES} more" if len(unscored) > _MOST_NAMES else ""
        names = ", ".join(unscored[:_MOST_NAMES])
        warnings.append(f"Done, but without a finite {metric_name(main) or 'score'}: {names}{more}.")
    if study.overlap:
        warnings.append(f"{study.overlap}.")
    return warnings


def _score(cell: Cell, metric: str) -> float | None:
    evaluation = None if cell.run is None else cell.run.evaluation
    score = None if evaluation is None else evaluation.scores.get(metric)
    return None if score is None else score.score


def _unfinished(study: Study) -> Section | None:
    failed = [cell for cell in study.cells if cell.status == "failed"]
    waiting = [cell for cell in study.cells if cell.status == "waiting"]
    blocks: list[Block] = []
    if failed:
        rows = [[Value(cell.id), Value(cell.error or "no reason was written down")] for cell in failed]
        blocks.append(Table("Failed", [Column("cell", numeric=False), Column("error", numeric=False)], rows))
    if waiting:
        blocks.append(Details(f"{len(waiting)} waiting", [Text(", ".join(cell.id for cell in waiting))]))
    return Section("What is missing", blocks) if blocks else None


def _cells_table(cells: Sequence[Cell], main: str) -> Table:
    decimals = decimals_for([score for cell in cells if (score := _score(cell, main)) is not None])
    columns = [Column("cell", numeric=False), Column("status", numeric=False), Column(metric_name(main) or "score")]
    columns += [
        Column("dev. loss", "per token"),
        Column("steps"),
        Column("training", "time"),
        Column("evaluation", "time"),
    ]
    rows = []
    for cell in cells:
        figures, score = cell_figures(cell), _score(cell, main)
        rows.append(
            [
                Value(cell.id),
                Value(cell.status),
                Value(fixed(score, decimals), number=score),
                Value(fixed(figures.get("dev_loss"), 3), number=figures.get("dev_loss")),
                Value(count(figures.get("steps")), number=figures.get("steps")),
                Value(duration(figures.get("train_seconds")), number=figures.get("train_seconds")),
                Value(duration(figures.get("evaluate_seconds")), number=figures.get("evaluate_seconds")),
            ]
        )
    return Table("Every cell", columns, rows)
