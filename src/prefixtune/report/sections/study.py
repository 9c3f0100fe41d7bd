"""A study's part of a report, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.pages.document import Block, Facts, Listing, Section, Table, Text, texts
from prefixtune.pages.format import count, duration, metric_name, plain, words
from prefixtune.report.results import Cell, Study
from prefixtune.report.sections.charts import axis_section, groups_section, losses_section
from prefixtune.report.sections.details import differences_section, outputs_section, settings_section, tuning_section
from prefixtune.report.sections.points import cell_figures, name_factors, point_names, representatives, study_systems
from prefixtune.report.sections.systems import System, headline, main_metric, scores_section, scores_table

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
    headline: Facts | None
    sections: Sequence[Section | None]

    @property
    def shown(self) -> list[Section]:
        """The sections that there are."""
        return [section for section in self.sections if section is not None]


def study_part(study: Study) -> Part:
    """Everything in a study's folder."""
    systems = study_systems(study)
    main = main_metric(systems, study.metric) or study.metric
    shown, at = representatives(systems, study.axis)
    name = ", ".join(words(factor) for factor in name_factors(study)) or "system"
    sections = [
        _unfinished(study),
        scores_section(systems, main, study.axis, name),
        differences_section(study, systems, point_names(study)),
        axis_section(systems, study.axis, main),
        Section("Left out or made smaller", [Listing(study.cut)]) if study.cut else None,
        groups_section(shown, main),
        tuning_section(study.tuning),
        losses_section(systems),
        outputs_section(shown, f"Each system{at}: its first finished run." if len(systems) > 1 else ""),
        settings_section(systems, _origin(study), study.config),
        Section("Cells", [Section(f"All {len(study.cells)} cells", [_cells_table(study.cells, main)], folded=True)]),
    ]
    return Part(
        title=study.title or f"Study {study.name}",
        facts=_facts(study),
        warnings=_warnings(study, main),
        headline=headline(shown, main, at),
        sections=sections,
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    done = sum(cell.status == "done" for cell in study.cells)
    data = dict.fromkeys(
        f"{count(evaluation.num_examples)} examples of {evaluation.data}"
        for cell in study.cells
        if cell.run is not None and (evaluation := cell.run.evaluation) is not None
    )
    left_out = f"{len(study.cut)} {'thing' if len(study.cut) == 1 else 'things'}, listed below" if study.cut else ""
    return [
        ("task", study.task),
        ("backbone", study.backbone),
        ("scored on", "; ".join(data) if len(data) <= 3 else f"{len(data)} files"),
        ("varied", ", ".join(words(factor) for factor in study.factors)),
        ("cells", f"{done} of {len(study.cells)} done"),
        ("budget", "" if study.budget_minutes is None else f"{duration(60 * study.budget_minutes)} for each process"),
        ("left out", left_out),
        ("date", study.date),
    ]


def _origin(study: Study) -> list[tuple[str, str]]:
    return [
        ("command", study.command),
        ("folder", str(study.path)),
        ("machine", _in_one_line(study.machine)),
        ("version", _in_one_line(study.versions)),
    ]


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
    overlaps = (
        study.overlap.of("test"),
        study.dev_overlap.of("development"),
        study.test_dev_overlap.of("test", "development"),
    )
    warnings += [f"{text}." for text in overlaps if text]
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
        reasons = texts("error", [cell.error or "no reason was written down" for cell in failed])
        blocks.append(Table("Failed", [texts("cell", [cell.id for cell in failed]), reasons]))
    if waiting:
        blocks.append(Section(f"{len(waiting)} waiting", [Text(", ".join(cell.id for cell in waiting))], folded=True))
    return Section("What is missing", blocks) if blocks else None


def _cells_table(cells: Sequence[Cell], main: str) -> Table:
    """Each cell as a system of its own."""
    systems = [
        System(cell.id, [cell.run] if cell.status == "done" and cell.run else [], [cell_figures(cell)])
        for cell in cells
    ]
    return scores_table(systems, main, "Every cell", what="cell")
