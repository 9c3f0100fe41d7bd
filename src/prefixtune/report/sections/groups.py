"""Scores by parts of the data: by category, by number of triples, by what was seen in training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from prefixtune.report.charts import Bar, bar_chart, swatch
from prefixtune.report.document import Chart, Charts, Column, Details, Section, Table, Value
from prefixtune.report.format import count, decimals_for, fixed, metric_name, natural, words
from prefixtune.report.sections.systems import System, is_higher_better, mark_best, score_value

__all__ = ["groups_section"]


_KINDS = {"seen": "whether the category was seen in training", "triples": "number of triples"}


def groups_section(systems: Sequence[System], main: str, identity: str) -> Section | None:
    """Scores by category and the like: bars for the main metric, a table for all."""
    systems = [system for system in systems if any(each.groups for each in system.evaluations)]
    kinds = dict.fromkeys(kind for system in systems for each in system.evaluations for kind in each.groups)
    charts, tables = [], []
    for kind in kinds:
        sizes: dict[str, int] = {}
        for system in systems:
            for each in system.evaluations:
                for name, group in each.groups.get(kind, {}).items():
                    sizes.setdefault(name, group.num_examples)
        if sizes:
            names = sorted(sizes, key=natural)
            charts.append(_group_chart(systems, main, kind, {name: sizes[name] for name in names}, identity))
            metrics = _group_metrics(systems, main, kind)
            if len(metrics) > 1:
                tables.append(_group_table(systems, metrics, kind, names))
    if not charts:
        return None
    more = [Details("Every metric, part by part", tables)] if tables else []
    return Section("Parts of the data", [Charts(charts), *more])


def _group_metrics(systems: Sequence[System], main: str, kind: str) -> list[str]:
    """The metrics that the parts of one kind were scored by, the main one first."""
    groups = [
        group for system in systems for each in system.evaluations for group in each.groups.get(kind, {}).values()
    ]
    return sorted(dict.fromkeys(name for group in groups for name in group.scores), key=lambda name: name != main)


def _group_chart(systems: Sequence[System], main: str, kind: str, sizes: Mapping[str, int], identity: str) -> Chart:
    spreads = {(s.style, name): s.spread(main, (kind, name)) for s in systems for name in sizes}
    decimals = decimals_for([spread.mean for spread in spreads.values() if spread is not None])
    # Not everybody can tell the colours apart, and there may be more systems than colours.
    letters = [f"{_letters(index)} " if len(systems) > 1 else "" for index in range(len(systems))]
    groups = []
    for name, size in sizes.items():
        bars = []
        for letter, system in zip(letters, systems, strict=True):
            spread = spreads[system.style, name]
            mean = None if spread is None else spread.mean
            bars.append(Bar(mean, letter + fixed(mean, decimals), system.style, system.span(main, (kind, name))))
        groups.append((f"{name} ({size:,})", bars))
    title = f"{metric_name(main)} by {_KINDS.get(kind, words(kind))}"
    text = f"Bars of {metric_name(main)} for each of {len(sizes)} parts; the figures are in the table below."
    rows = []
    for name, size in sizes.items():
        values = [score_value(system, main, decimals, (kind, name)) for system in systems]
        rows.append(
            [
                Value(name),
                Value(count(size), number=size),
                *mark_best(values, higher=is_higher_better(systems, main)),
            ]
        )
    columns = [Column(words(kind), numeric=False), Column("examples"), *(Column(system.name) for system in systems)]
    return Chart(
        title=title,
        description=text,
        svg=bar_chart(groups, x_label=metric_name(main), identity=_slug(f"{identity}-{kind}"), title=title, text=text),
        legend=[(letter + s.name, swatch(s.style, "bar")) for letter, s in zip(letters, systems, strict=True)],
        table=Table(f"{title}: the figures", columns, rows),
    )


def _letters(index: int) -> str:
    """The letters of a series.

    >>> [_letters(index) for index in (0, 25, 26)]
    ['A', 'Z', 'AA']
    """
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _slug(text: str) -> str:
    """An id without spaces, which would split it in two where another element refers to it."""
    return re.sub(r"\s+", "_", text)


def _group_table(systems: Sequence[System], metrics: Sequence[str], kind: str, names: Sequence[str]) -> Table:
    """A row for each part and system, a column for each metric."""
    columns = [Column(words(kind), numeric=False), Column("system", numeric=False)]
    columns += [Column(metric_name(m), "" if is_higher_better(systems, m) else "lower is better") for m in metrics]
    rows: list[list[Value]] = []
    for name in names:
        block = [[Value(name), Value(system.name)] for system in systems]
        for metric in metrics:
            means = [s.mean for system in systems if (s := system.spread(metric, (kind, name))) is not None]
            values = [score_value(system, metric, decimals_for(means), (kind, name)) for system in systems]
            for row, value in zip(block, mark_best(values, higher=is_higher_better(systems, metric)), strict=True):
                row.append(value)
        rows += block
    return Table(f"By {_KINDS.get(kind, words(kind))}", columns, rows, num_headers=2)
