"""From results to a document: evaluations of the same data side by side, trainings together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.pages.document import Block, Document, Facts, Section, Text
from prefixtune.pages.format import count, metric_name, signed
from prefixtune.report.charts import groups_section, losses_section
from prefixtune.report.details import outputs_section, settings_section
from prefixtune.report.run import Run
from prefixtune.report.systems import System, main_metric, scores_section


@dataclass(frozen=True)
class _Part:
    """What belongs together."""

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]


def compose(runs: Sequence[Run], title: str = "") -> Document:
    """Make a report.

    Args:
        runs: At least one, as read by `read_results`.
        title: Empty: made from the results.
    """
    groups = [*_same_data([run for run in runs if run.evaluation]), [run for run in runs if not run.evaluation]]
    parts = [_part(group) for group in groups if group]
    alone = parts[0] if len(parts) == 1 else None
    title = title or (alone.title if alone else "Report")
    summary: list[Block] = []
    for part in parts:
        blocks: list[Block] = [*(Text(text, warning=True) for text in part.warnings), Facts(part.facts)]
        summary += blocks if alone else [Section(part.title, blocks)]
    return Document(
        title=title,
        subtitle="" if alone is None or alone.title == title else alone.title,
        sections=[
            Section("Summary", summary),
            *(alone.sections if alone else [Section(part.title, part.sections) for part in parts]),
        ],
        warnings=[warning for part in parts for warning in part.warnings],
    )


def _same_data(runs: Sequence[Run]) -> list[list[Run]]:
    """Evaluations of the same examples together, in the order of the first of each group."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if _on_same_data(group[0], run)), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    return groups


def _on_same_data(run: Run, second: Run) -> bool:
    """Whether two were scored on the same examples: by their sources, or by the file's name where none are stored."""
    one, other = run.evaluation, second.evaluation
    if one is None or other is None or one.task != other.task or one.num_examples != other.num_examples:
        return False
    if run.outputs and second.outputs:
        first, then = ([(row.source, row.references) for row in each.outputs] for each in (run, second))
        return first == then
    return (one.data, one.split) == (other.data, other.split)


def _part(runs: Sequence[Run]) -> _Part:
    """Evaluations of the same examples, or training runs that were not evaluated."""
    named = list(zip(_names(runs), runs, strict=True))
    systems = [System(name, run, style) for style, (name, run) in enumerate(named)]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    main = main_metric(systems)
    if evaluations:
        first = evaluations[0]
        title = named[0][0] if len(runs) == 1 else f"{len(runs)} systems on {first.task or first.data}"
        facts = [
            ("task", first.task),
            ("data", f"{first.data}, {first.split}" if first.split else first.data),
            ("examples", count(first.num_examples)),
            ("backbone", _joined(evaluation.backbone for evaluation in evaluations)),
            ("difference", _difference(systems, main)),
        ]
    else:
        title = f"Training run: {named[0][0]}" if len(runs) == 1 else f"{len(runs)} training runs"
        facts = [(key, _joined(run.config.get(key) for run in runs)) for key in ("task", "backbone", "train")]
    sections = (
        scores_section(systems, main),
        groups_section(systems, main),
        losses_section(systems),
        outputs_section(systems),
        settings_section(systems, [("folders", ", ".join(str(run.path) for run in runs))]),
    )
    return _Part(
        title,
        facts,
        [f"{name}: {warning}" for name, run in named for warning in _warnings(run)],
        [section for section in sections if section is not None],
    )


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _warnings(run: Run) -> Iterator[str]:
    evaluation = run.evaluation
    if evaluation is None:
        if not any(event.get("event") == "end" for event in run.events):
            yield "the log has no end; the run was stopped, or still goes on."
        return
    for key, score in evaluation.scores.items():
        if not math.isfinite(score.score):
            yield f"no finite {metric_name(key)}."
    if evaluation.overlap is not None and evaluation.overlap.count:
        yield f"{evaluation.overlap}."
    if not evaluation.scores:
        yield "no scores."


def _names(runs: Sequence[Run]) -> list[str]:
    """A unique name for each run: its title, or its folder's name, or its whole path."""
    titles = [(run.evaluation.title if run.evaluation else "") or run.path.resolve().name for run in runs]
    names = [
        title if titles.count(title) == 1 else f"{title} ({run.path.resolve().name})"
        for title, run in zip(titles, runs, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{title} ({run.path})"
        for name, title, run in zip(names, titles, runs, strict=True)
    ]


def _difference(systems: Sequence[System], main: str) -> str:
    """The second's main score minus the first's, where there are two."""
    scores = [score.score for system in systems if (score := system.score(main))]
    if len(systems) != 2 or len(scores) != 2:
        return ""
    decimals = 4 if max(map(abs, scores)) < 1 else 2
    return f"{signed(scores[1] - scores[0], decimals)} {metric_name(main)} from {systems[0].name} to {systems[1].name}"
