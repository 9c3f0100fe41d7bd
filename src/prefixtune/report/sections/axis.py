"""Scores over a number: the size of the data, the length of the prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune.report.document import Chart, Charts, Column, Section, Series, Table, Value
from prefixtune.report.format import MISSING, decimals_for, metric_name, short, words
from prefixtune.report.sections.systems import System, is_higher_better, mark_best, metric_keys, score_value

__all__ = ["axis_section"]


def axis_section(systems: Sequence[System], axis: str, main: str) -> Section | None:
    """Every metric over a study's numeric factor."""
    if not axis:
        return None
    charts = [_axis_chart(systems, axis, metric) for metric in metric_keys(systems, main)]
    drawn = [chart for chart in charts if chart is not None]
    return Section(f"Scores over {words(axis)}", [Charts(drawn)]) if drawn else None


def _axis_chart(systems: Sequence[System], axis: str, metric: str) -> Chart | None:
    by_name: dict[str, list[System]] = {}
    for system in sorted(systems, key=lambda system: system.style):
        if system.spread(metric) is not None:
            by_name.setdefault(system.name, []).append(system)
    lines, levels = [], []
    for name, members in by_name.items():
        spans = [(s.axis_value, spread.mean, s.span(metric)) for s in members if (spread := s.spread(metric))]
        along = [(value, mean, span or (mean, mean)) for value, mean, span in spans if value is not None]
        style = members[0].style
        if along:
            lines.append(Series(name, [(x, y) for x, y, _ in along], style, [span for _, _, span in along]))
        levels += [Series(name, [(0.0, mean)], style, kind="level") for value, mean, _ in spans if value is None]
    if not lines:
        return None
    title = f"{metric_name(metric)} over {words(axis)}"
    text = (
        f"{metric_name(metric)} of {len(by_name)} {'system' if len(by_name) == 1 else 'systems'}. Error bars reach "
        "from the lowest to the highest of several runs, or over the confidence interval of a single one."
    )
    table = _axis_table(by_name, axis, metric, title)
    return Chart(title, text, [*lines, *levels], words(axis), metric_name(metric), table)


def _axis_table(by_name: Mapping[str, Sequence[System]], axis: str, metric: str, title: str) -> Table:
    """Values on the axis as rows, systems as columns."""
    systems = [system for members in by_name.values() for system in members]
    decimals = decimals_for([spread.mean for s in systems if (spread := s.spread(metric)) is not None])
    higher = is_higher_better(systems, metric)
    along = sorted({system.axis_value for system in systems}, key=lambda value: value or 0.0)
    rows = []
    for axis_value in along:
        chosen = [next((s for s in members if s.axis_value == axis_value), None) for members in by_name.values()]
        values = [Value(MISSING) if s is None else score_value(s, metric, decimals) for s in chosen]
        rows.append(mark_best(values, higher=higher))
    columns = [Column(words(axis), [Value("–" if x is None else short(x)) for x in along])]
    columns += [Column(name, [row[index] for row in rows]) for index, name in enumerate(by_name)]
    return Table(f"{title}: the figures", columns)
