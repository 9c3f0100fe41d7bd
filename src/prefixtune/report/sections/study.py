"""A study's part of a report, finished or not.

Knows folders' contents and the document's blocks; nothing of how either is written, nor of any single study.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from prefixtune.report.charts import NUM_STYLES
from prefixtune.report.document import Block, Column, Details, Headline, Listing, Section, Table, Text, Value
from prefixtune.report.format import count, decimals_for, duration, fixed, metric_name, natural, plain, short, words
from prefixtune.report.load import Cell, Study
from prefixtune.report.sections.axis import axis_section
from prefixtune.report.sections.details import losses_section, outputs_section, settings_section, spread_out
from prefixtune.report.sections.groups import groups_section
from prefixtune.report.sections.systems import System, figures_of, headline, main_metric, mark_best, scores_section

__all__ = ["Part", "flat_facts", "study_part"]


REPETITIONS = ("subset", "seed")


@dataclass(frozen=True)
class Part:
    """One subject of a report.

    Attributes:
        facts: What was run, on what and when.
        warnings: What keeps it from being whole.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    headline: Headline | None
    sections: Sequence[Section]


def study_part(study: Study, identity: str) -> Part:
    """Everything that a study's folder tells.

    Args:
        study: As it was read.
        identity: Prefix of the ids in the charts.
    """
    systems = _systems(study)
    main = main_metric(systems, study.metric) or study.metric
    shown, at = _representatives(systems, study.axis)
    what = ", ".join(words(factor) for factor in _factors(study)) or "system"
    sections = [
        _unfinished(study),
        scores_section(systems, main, study.axis, what),
        _differences(study, systems),
        axis_section(systems, study.axis, main, identity),
        Section("Left out or made smaller", [Listing(study.cut)]) if study.cut else None,
        groups_section(shown, main, identity),
        _tuning(study.tuning),
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


def _factors(study: Study) -> list[str]:
    """What names a system: the study's factors, and others that vary, but neither the axis nor what is repeated."""
    values: dict[str, set[object]] = {}
    for cell in study.cells:
        for key, value in cell.factors.items():
            values.setdefault(key, set()).update([value] if _says_something(value) else [])
    names = dict.fromkeys([*study.factors, *(key for key in values if len(values[key]) > 1)])
    found = [name for name in names if name in values and name not in (study.axis, *REPETITIONS)]
    return found or ["method"] * ("method" in values)


def _systems(study: Study) -> list[System]:
    """Cells with equal factors, but those that are repeated, as one system."""
    names = _factors(study)
    cells: dict[tuple[str, float | None], list[Cell]] = {}
    # Runs on all targets know how many they are when they are done; those that wait are at the same place.
    places = {_point(cell): place for cell in study.cells if (place := _place(cell, study.axis)) is not None}
    for cell in study.cells:
        if cell.factors:
            cells.setdefault((_name(study, cell, names), places.get(_point(cell))), []).append(cell)
    keys = sorted(cells, key=lambda key: (-1.0 if key[1] is None else key[1], natural(key[0])))
    styles = {name: number for number, name in enumerate(sorted({name for name, _ in keys}, key=natural))}
    systems = []
    for name, place in keys:
        group = sorted(cells[name, place], key=lambda cell: [natural(cell.factors.get(key)) for key in REPETITIONS])
        done = [cell for cell in group if cell.status == "done" and cell.run is not None]
        systems.append(
            System(
                name=name,
                runs=[cell.run for cell in done if cell.run is not None],
                figures=[_figures(cell) for cell in done],
                planned=len(group),
                place=place,
                axis=study.axis,
                style=styles[name],
            )
        )
    return systems


def _name(study: Study, cell: Cell, factors: Sequence[str]) -> str:
    """What a cell's system is called, wherever on the axis it is."""
    told = [_factor(key, cell.factors[key]) for key in factors if _says_something(cell.factors.get(key))]
    return ", ".join(told) or study.name


def _factor(key: str, value: Any) -> str:
    """A factor's value as part of a name: a word tells itself, a number needs its factor's name."""
    return value if isinstance(value, str) else f"{words(key)} {plain(value)}"


def _says_something(value: Any) -> bool:
    """Whether a factor is more than absent: 0 targets or positions are those of a method that takes none, or all."""
    return value is not None and (isinstance(value, bool) or value != 0)


def _point(cell: Cell) -> str:
    """What its repetitions have in common."""
    return json.dumps({key: value for key, value in cell.factors.items() if key not in REPETITIONS}, sort_keys=True)


def _place(cell: Cell, axis: str) -> float | None:
    """Where on the axis a cell is; the bare model is nowhere, and is drawn as a level.

    A run on all targets has 0 in its factors; how many they are is among its figures, or in its log.
    """
    value = cell.factors.get(axis) or cell.figures.get(axis)
    if not value and cell.run is not None:
        value = next((event.get(axis) for event in cell.run.events if event.get("event") == "start"), None)
    return float(value) if isinstance(value, int | float) and value else None


def _figures(cell: Cell) -> dict[str, float]:
    return {**(figures_of(cell.run) if cell.run is not None else {}), **cell.figures}


def _representatives(systems: Sequence[System], axis: str) -> tuple[list[System], str]:
    """A few systems that can be compared, and where on the axis they are.

    Of several series: each at the farthest place that all have reached. Of a single one, or where there is no such
    place: every place.
    """
    finished = [system for system in systems if system.evaluations]
    reached: dict[str, set[float]] = {}
    for system in finished:
        if system.place is not None:
            reached.setdefault(system.name, set()).add(system.place)
    if not reached:
        return sorted(finished, key=lambda system: system.style), ""
    common = set.intersection(*reached.values())
    if len(reached) > 1 and common:
        chosen = [system for system in finished if system.place in (None, max(common))]
        return sorted(chosen, key=lambda system: system.style), f" at {words(axis)} {short(max(common))}"
    shown = spread_out(finished, NUM_STYLES)
    if len(reached) == 1:
        shown = [
            s if s.place is None else replace(s, name=f"{words(axis)} {short(s.place)}", place=None) for s in shown
        ]
    return [replace(system, name=system.label, style=number) for number, system in enumerate(shown)], ""


def _differences(study: Study, systems: Sequence[System]) -> Section | None:
    """How far each point is from its counterpart, on the same test items."""
    if not study.differences:
        return None
    factors, names = _factors(study), dict[str, str]()
    for cell in study.cells:
        place = cell.factors.get(study.axis)
        at = f", {words(study.axis)} {plain(place)}" if _says_something(place) else ""
        names[cell.id.rpartition("-subset")[0]] = _name(study, cell, factors) + at
    decimals = decimals_for([spread.mean for system in systems if (spread := system.spread(study.metric)) is not None])
    rows = []
    for each in study.differences:
        error = f"± {fixed(each.standard_error, decimals)}" if each.standard_error is not None else ""
        rows.append(
            [
                Value(names.get(each.point, each.point)),
                Value(names.get(each.reference, each.reference)),
                Value(each.part or "all"),
                Value(_signed(each.mean, decimals), error, number=each.mean),
                Value("; ".join(_signed(value, decimals) for value in each.differences)),
                Value("; ".join(fixed(value, 3) for value in each.p_values)),
            ]
        )
    columns = [Column("of", numeric=False), Column("less that of", numeric=False), Column("test items", numeric=False)]
    columns += [Column("mean", "± standard error"), Column("each run"), Column("p", "each run")]
    parted = any(each.part for each in study.differences)
    tested = any(value is not None for each in study.differences for value in each.p_values)
    kept = [True, True, parted, True, True, tested]
    table = Table(
        f"Differences in {metric_name(study.metric)}",
        list(compress(columns, kept)),
        [list(compress(row, kept)) for row in rows],
        num_headers=2,
    )
    notes = [
        f"p: {study.difference_test}, over the test items: how often chance alone gives so large a difference. It is "
        "of these runs; how far another seed or sample moves a score is in the standard error, where there are several."
    ]
    return Section("Differences", [table, Listing(notes)] if tested else [table])


def _signed(value: float, decimals: int) -> str:
    return f"{'+' * (value >= 0)}{fixed(value, decimals)}"


# --- what was run ----------------------------------------------------------------------------------------------------


def _facts(study: Study) -> list[tuple[str, str]]:
    done = sum(cell.status == "done" for cell in study.cells)
    data = dict.fromkeys(
        f"{count(e.num_examples)} examples of {e.data}"
        for cell in study.cells
        if cell.run is not None and (e := cell.run.evaluation) is not None
    )
    facts = [
        ("task", study.task),
        ("backbone", study.backbone),
        ("scored on", "; ".join(data) if len(data) <= 3 else f"{len(data)} files"),
        ("varied", ", ".join(words(factor) for factor in study.factors)),
        ("cells", f"{done} of {len(study.cells)} done"),
        ("budget", "" if study.budget_minutes is None else f"{duration(60 * study.budget_minutes)} of each process"),
        (
            "left out",
            f"{len(study.cut)} {'thing' if len(study.cut) == 1 else 'things'}, listed below" * bool(study.cut),
        ),
        ("date", study.date),
    ]
    return [(name, text) for name, text in facts if text]


def _origin(study: Study) -> list[tuple[str, str]]:
    facts = [("command", study.command), ("folder", str(study.path))]
    return [
        *((name, text) for name, text in facts if text),
        *flat_facts("machine", study.machine),
        *flat_facts("version", study.versions),
    ]


def flat_facts(name: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A mapping in one line."""
    text = ", ".join(f"{words(key)} {plain(value)}" for key, value in values.items() if value not in (None, ""))
    return [(name, text)] if text else []


def _warnings(study: Study, main: str) -> list[str]:
    numbers = {status: sum(cell.status == status for cell in study.cells) for status in ("done", "failed", "waiting")}
    found = []
    if numbers["done"] < len(study.cells):
        rest = [f"{numbers[s]} {word}" for s, word in (("failed", "failed"), ("waiting", "wait")) if numbers[s]]
        found.append(
            f"This study is unfinished: {numbers['done']} of {len(study.cells)} cells are done, {', '.join(rest)}. "
            "What follows is of those that are done."
        )
    bare = [cell.id for cell in study.cells if cell.status == "done" and _score(cell, main) is None]
    if bare:
        shown = ", ".join(bare[:8]) + (f" and {len(bare) - 8} more" if len(bare) > 8 else "")
        found.append(f"Done, but without a finite {metric_name(main) or 'score'}: {shown}.")
    if study.overlap:
        found.append(f"{study.overlap}.")
    return found


def _score(cell: Cell, metric: str) -> float | None:
    evaluation = None if cell.run is None else cell.run.evaluation
    measure = None if evaluation is None else evaluation.scores.get(metric)
    return None if measure is None else measure.score


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
        figures, score = _figures(cell), _score(cell, main)
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


# --- tuning ----------------------------------------------------------------------------------------------------------


def _tuning(tuning: Mapping[str, Any]) -> Section | None:
    """What was tried for each method, by development loss, and what was chosen."""
    rows: list[list[Value]] = []
    edges = []
    for method, given in tuning.items():
        tried = {key: value for key, value in given.items() if isinstance(value, Mapping)} if _is(given) else {}
        for key, losses in tried.items():
            names = sorted(losses, key=_number)
            picked = next((name for name in names if _same(name, given.get("chosen"))), None)
            found = [x if isinstance(x, int | float) and math.isfinite(x) else None for x in map(losses.get, names)]
            values = mark_best([Value(fixed(loss, 4), number=loss) for loss in found], higher=False)
            for name, value in zip(names, values, strict=True):
                tried_value = Value(name, number=_number(name))
                rows.append([Value(method), Value(words(key)), tried_value, value, Value("chosen" * (name == picked))])
            if len(names) > 1 and picked in (names[0], names[-1]):
                edges.append(f"{method}: {words(key)} {picked}")
    if not rows:
        return None
    columns = [Column("method", numeric=False), Column("setting", numeric=False), Column("tried")]
    columns += [Column("development loss"), Column("choice", numeric=False)]
    blocks: list[Block] = [Table("Tried before the study, by development loss", columns, rows, num_headers=3)]
    if edges:
        blocks.append(
            Text(f"Chosen at the edge of what was tried, so that a better one may lie beyond: {'; '.join(edges)}.")
        )
    return Section("Tuning", blocks)


def _is(value: object) -> bool:
    return isinstance(value, Mapping)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _same(name: str, chosen: Any) -> bool:
    return name == str(chosen) or (isinstance(chosen, int | float) and _number(name) == float(chosen))
