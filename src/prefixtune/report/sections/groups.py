"""Scores by parts of the data: by category, by number of triples, by what was seen in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune.report.document import Block, Chart, Charts, Column, Details, Section, Series, Table, Value
from prefixtune.report.format import count, decimals_for, metric_name, natural, words
from prefixtune.report.sections.systems import System, is_higher_better, mark_best, score_value

__all__ = ["groups_section"]


_KINDS = {"seen": "whether the category was seen in training", "triples": "number of triples"}
MOST_DRAWN = 60
"""Rows of a chart."""


def groups_section(systems: Sequence[System], main: str) -> Section | None:
    """Scores by category and the like: a chart for the main metric, a table for all."""
    systems = [system for system in systems if any(each.groups for each in system.evaluations)]
    sizes: dict[str, dict[str, int]] = {}
    metrics: dict[str, dict[str, None]] = {}
    for kind, groups in (pair for system in systems for each in system.evaluations for pair in each.groups.items()):
        for name, group in groups.items():
            sizes.setdefault(kind, {}).setdefault(name, group.num_examples)
            metrics.setdefault(kind, {}).update(dict.fromkeys(group.scores))
    if not sizes:
        return None
    ordered = {kind: {name: of[name] for name in sorted(of, key=natural)} for kind, of in sizes.items()}
    charts = [_group_chart(systems, main, kind, of) for kind, of in ordered.items()]
    tables: list[Block] = [
        _group_table(systems, sorted(metrics[kind], key=lambda name: name != main), kind, list(of))
        for kind, of in ordered.items()
        if len(metrics[kind]) > 1
    ]
    more = [Details("Every metric, part by part", tables)] if tables else []
    return Section("Parts of the data", [Charts(charts), *more])


def _title(kind: str) -> str:
    return _KINDS.get(kind, words(kind))


def _group_chart(systems: Sequence[System], main: str, kind: str, sizes: Mapping[str, int]) -> Chart:
    drawn = list(sizes)[:MOST_DRAWN]
    series = []
    for system in systems[:MOST_DRAWN]:
        spreads = [(row, system.spread(main, (kind, name)), name) for row, name in enumerate(drawn)]
        dots = [(s.mean, row, system.span(main, (kind, name)) or (s.mean, s.mean)) for row, s, name in spreads if s]
        if dots:
            ranges = [span for _, _, span in dots]
            series.append(Series(system.name, [(x, y) for x, y, _ in dots], system.style, ranges, "dots"))
    title = f"{metric_name(main)} by {_title(kind)}"
    text = f"{metric_name(main)} for each of {len(sizes)} parts, with its interval; the figures are in the table below."
    if len(drawn) < len(sizes) or len(systems) > MOST_DRAWN:
        text += f" At most {MOST_DRAWN} parts and systems are drawn."
    means = [spread.mean for s in systems for name in sizes if (spread := s.spread(main, (kind, name))) is not None]
    values = {name: _best_of(systems, main, (kind, name), decimals_for(means)) for name in sizes}
    columns = [
        Column(words(kind), [Value(name) for name in sizes], numeric=False),
        Column("examples", [Value(count(size), number=size) for size in sizes.values()]),
        *(Column(s.name, [values[name][index] for name in sizes]) for index, s in enumerate(systems)),
    ]
    table = Table(f"{title}: the figures", columns)
    rows = [f"{name} ({sizes[name]:,})" for name in drawn]
    return Chart(title, text, series, metric_name(main), words(kind), table, rows)


def _best_of(systems: Sequence[System], metric: str, group: tuple[str, str], decimals: int) -> list[Value]:
    values = [score_value(system, metric, decimals, group) for system in systems]
    return mark_best(values, higher=is_higher_better(systems, metric))


def _group_table(systems: Sequence[System], metrics: Sequence[str], kind: str, names: Sequence[str]) -> Table:
    """A row for each part and system, a column for each metric."""
    columns = [
        Column(words(kind), [Value(name) for name in names for _ in systems], numeric=False),
        Column("system", [Value(system.name) for _ in names for system in systems], numeric=False),
    ]
    for metric in metrics:
        values = []
        for name in names:
            means = [s.mean for system in systems if (s := system.spread(metric, (kind, name))) is not None]
            values += _best_of(systems, metric, (kind, name), decimals_for(means))
        small = "" if is_higher_better(systems, metric) else "lower is better"
        columns.append(Column(metric_name(metric), values, small))
    return Table(f"By {_title(kind)}", columns, num_headers=2)
