"""Scores over a number: the size of the data, the length of the prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune.report.charts import Line, line_chart, swatch
from prefixtune.report.document import Chart, Charts, Column, Section, Table, Value
from prefixtune.report.format import MISSING, decimals_for, metric_name, short, words
from prefixtune.report.sections.systems import System, is_higher_better, mark_best, metric_keys, score_value

__all__ = ["axis_section"]


def axis_section(systems: Sequence[System], axis: str, main: str, identity: str) -> Section | None:
    """Every metric over a study's numeric factor."""
    if not axis:
        return None
    charts = [
        chart
        for index, metric in enumerate(metric_keys(systems, main))
        if (chart := _axis_chart(systems, axis, metric, f"{identity}-axis-{index}")) is not None
    ]
    return Section(f"Scores over {words(axis)}", [Charts(charts)]) if charts else None


def _axis_chart(systems: Sequence[System], axis: str, metric: str, identity: str) -> Chart | None:
    series: dict[str, list[System]] = {}
    for system in sorted(systems, key=lambda system: system.style):
        if system.spread(metric) is not None:
            series.setdefault(system.name, []).append(system)
    lines, levels = [], []
    for members in series.values():
        spans = [(s.axis_value, spread.mean, s.span(metric)) for s in members if (spread := s.spread(metric))]
        along = [(value, mean, span or (mean, mean)) for value, mean, span in spans if value is not None]
        style = members[0].style
        if along:
            lines.append(Line([(x, y) for x, y, _ in along], style, [span for _, _, span in along]))
        levels += [Line([(0.0, mean)], style, kind="level") for value, mean, _ in spans if value is None]
    if not lines:
        return None
    title = f"{metric_name(metric)} over {words(axis)}"
    text = (
        f"{metric_name(metric)} of {len(series)} {'system' if len(series) == 1 else 'systems'}. Error bars reach from "
        "the lowest to the highest of several runs, or over the confidence interval of a single one."
    )
    kinds = {line.style: line.kind for line in [*levels, *lines]}
    labels = {"x_label": words(axis), "y_label": metric_name(metric)}
    return Chart(
        title=title,
        description=text,
        svg=line_chart([*lines, *levels], **labels, identity=identity, title=title, text=text),
        legend=[(name, swatch(members[0].style, kinds[members[0].style])) for name, members in series.items()],
        table=_axis_table(series, axis, metric, title),
    )


def _axis_table(series: Mapping[str, Sequence[System]], axis: str, main: str, title: str) -> Table:
    """Values on the axis as rows, systems as columns."""
    spreads = [spread for members in series.values() for s in members if (spread := s.spread(main)) is not None]
    decimals = decimals_for([spread.mean for spread in spreads])
    higher = is_higher_better([system for members in series.values() for system in members], main)
    axis_values = sorted({s.axis_value for members in series.values() for s in members}, key=lambda value: value or 0.0)
    rows = []
    for axis_value in axis_values:
        values = []
        for members in series.values():
            system = next((system for system in members if system.axis_value == axis_value), None)
            values.append(Value(MISSING) if system is None else score_value(system, main, decimals))
        rows.append([Value("–" if axis_value is None else short(axis_value)), *mark_best(values, higher=higher)])
    return Table(f"{title}: the figures", [Column(words(axis)), *(Column(name) for name in series)], rows)
