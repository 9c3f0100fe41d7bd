"""From results to a document: studies one by one, evaluations of the same data side by side, trainings together."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.report.document import Block, Document, Facts, Section, Text, Value
from prefixtune.report.format import count, fixed, metric_name, signed
from prefixtune.report.results import Evaluation, Run, Study
from prefixtune.report.sections.charts import groups_section, losses_section
from prefixtune.report.sections.details import outputs_section, settings_section
from prefixtune.report.sections.study import Part, study_part
from prefixtune.report.sections.systems import (
    System,
    figures_of,
    headline,
    main_metric,
    mark_best,
    scores_section,
    scores_table,
)

__all__ = ["compose"]


def compose(sources: Sequence[Study | Run], title: str = "") -> Document:
    """Make a report.

    Args:
        sources: At least one, as read by `read_results`.
        title: Empty: made from the results.
    """
    parts = [study_part(source) for source in sources if isinstance(source, Study)]
    runs = [source for source in sources if isinstance(source, Run)]
    for group in _same_data([run for run in runs if run.evaluation is not None]):
        parts.append(_comparison(group))
    trained = [run for run in runs if run.evaluation is None]
    if trained:
        parts.append(_trainings(trained))

    alone = parts[0] if len(parts) == 1 else None
    title = title or (alone.title if alone else "Report")
    summary: list[Block] = []
    for part in parts:
        blocks: list[Block] = [Text(text, warning=True) for text in part.warnings]
        blocks += [part.headline] if part.headline else []
        blocks += [Facts(part.facts)] if part.facts else []
        summary += blocks if alone else [Section(part.title, blocks)]
    sections = alone.shown if alone else [Section(part.title, part.shown) for part in parts]
    return Document(
        title=title,
        subtitle="" if alone is None or alone.title == title else alone.title,
        sections=[Section("Summary", summary), *sections],
        warnings=[warning for part in parts for warning in part.warnings],
    )


def _same_data(runs: Sequence[Run]) -> list[list[Run]]:
    """Evaluations of the same examples together, in the order of the first of each group."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if _on_same_data(group[0].evaluation, run.evaluation)), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    return groups


def _on_same_data(one: Evaluation | None, other: Evaluation | None) -> bool:
    """Whether two were scored on the same examples: by their sources, or by the file's name where none are stored."""
    if one is None or other is None or one.task != other.task or one.num_examples != other.num_examples:
        return False
    if one.outputs and other.outputs:
        return [(o.source, o.references) for o in one.outputs] == [(o.source, o.references) for o in other.outputs]
    return (one.data, one.split) == (other.data, other.split)


def _comparison(runs: Sequence[Run]) -> Part:
    """Evaluations of the same examples."""
    names = _names(runs)
    systems = [
        System(name, [run], [figures_of(run)], style=index)
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    first, main = evaluations[0], main_metric(systems)
    named = list(zip(names, evaluations, strict=True))
    warnings = [
        f"{name}: no finite {metric_name(metric)}."
        for name, evaluation in named
        for metric, score in evaluation.scores.items()
        if score.score is None
    ]
    warnings += [f"{name}: {evaluation.overlap}." for name, evaluation in named if str(evaluation.overlap)]
    warnings += [f"{name}: no scores." for name, evaluation in named if not evaluation.scores]
    facts = [
        ("task", first.task),
        ("data", f"{first.data}, {first.split}" if first.split else first.data),
        ("examples", count(first.num_examples)),
        ("backbone", ", ".join(dict.fromkeys(e.backbone for e in evaluations if e.backbone))),
        ("difference", _difference(systems, main)),
    ]
    sections = [
        scores_section(systems, main),
        groups_section(systems, main),
        losses_section(systems),
        outputs_section(systems),
        settings_section(systems, [("folders", ", ".join(str(run.path) for run in runs))]),
    ]
    return Part(
        title=names[0] if len(runs) == 1 else f"{len(runs)} systems on {first.task or first.data}",
        facts=facts,
        warnings=warnings,
        headline=headline(systems, main),
        sections=sections,
    )


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
    spreads = [system.spread(main) for system in systems]
    if len(spreads) != 2 or spreads[0] is None or spreads[1] is None:
        return ""
    gap = spreads[1].mean - spreads[0].mean
    decimals = 4 if max(abs(spreads[0].mean), abs(spreads[1].mean)) < 1 else 2
    return f"{signed(gap, decimals)} {metric_name(main)} from {systems[0].name} to {systems[1].name}"


def _trainings(runs: Sequence[Run]) -> Part:
    """Training runs that were not evaluated."""
    systems = [
        System(name, [run], [figures_of(run)], style=index)
        for index, (name, run) in enumerate(zip(_names(runs), runs, strict=True))
    ]
    unfinished = [
        f"{system.name}: the log has no end; the run was stopped, or still goes on."
        for system, run in zip(systems, runs, strict=True)
        if not any(event.get("event") == "end" for event in run.events)
    ]
    facts = [
        (key, ", ".join(dict.fromkeys(str(run.config[key]) for run in runs if run.config.get(key))))
        for key in ("task", "backbone", "train")
    ]
    sections = [
        Section("Runs", [scores_table(systems, "", "The result of each run", what="run")]),
        losses_section(systems),
        settings_section(systems, [("folders", ", ".join(str(run.path) for run in runs))]),
    ]
    return Part(
        title=f"Training run: {systems[0].name}" if len(runs) == 1 else f"{len(runs)} training runs",
        facts=facts,
        warnings=unfinished,
        headline=_loss_headline(systems),
        sections=sections,
    )


def _loss_headline(systems: Sequence[System]) -> Facts | None:
    """The best development loss of each run."""
    losses = [(system.name, system.cost("dev_loss")) for system in systems]
    known = [(name, Value(fixed(loss, 3), number=loss)) for name, loss in losses if loss is not None]
    marked = zip([name for name, _ in known], mark_best([value for _, value in known], higher=False), strict=True)
    return Facts(list(marked), "development loss per token, lower is better") if known else None
