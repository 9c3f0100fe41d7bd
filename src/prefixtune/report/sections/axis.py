"""Scores over a number: the size of the data, the length of the prefix.

Knows systems and the document's blocks; nothing of folders, nor of how a document is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune.report.charts import Line, line_chart, swatch
from prefixtune.report.document import Chart, Charts, Column, Section, Table, Value
from prefixtune.report.format import MISSING, decimals_for, metric_name, short, words
from prefixtune.report.sections.systems import System, mark_best, metric_keys, score_value

__all__ = ["axis_section"]


def axis_section(systems: Sequence[System], axis: str, main: str, identity: str) -> Section | None:
    """Every metric over a study's numeric factor."""
    if not axis:
        return None
    charts = [
        chart
        for number, metric in enumerate(metric_keys(systems, main))
        if (chart := _axis_chart(systems, axis, metric, f"{identity}-axis-{number}")) is not None
    ]
    return Section(f"Scores over {words(axis)}", [Charts(charts)]) if charts else None


def _axis_chart(systems: Sequence[System], axis: str, metric: str, identity: str) -> Chart | None:
    series: dict[str, list[System]] = {}
    for system in sorted(systems, key=lambda system: system.style):
        if system.spread(metric) is not None:
            series.setdefault(system.name, []).append(system)
    lines, levels = [], []
    for members in series.values():
        spans = [(s.place, spread.mean, s.span(metric)) for s in members if (spread := s.spread(metric)) is not None]
        along = [(place, mean, span or (mean, mean)) for place, mean, span in spans if place is not None]
        style = members[0].style
        if along:
            lines.append(Line([(x, y) for x, y, _ in along], style, [span for _, _, span in along]))
        levels += [Line([(0.0, mean)], style, kind="level") for place, mean, _ in spans if place is None]
    if not lines:
        return None
    title = f"{metric_name(metric)} over {words(axis)}"
    text = (
        f"{metric_name(metric)} of {len(series)} {'system' if len(series) == 1 else 'systems'}. Error bars reach from "
        "the least to the greatest of several runs, or over the confidence interval of a single one."
    )
    kinds = {line.style: line.kind for line in [*levels, *lines]}
    labels = {"x_label": words(axis), "y_label": metric_name(metric)}
    return Chart(
        title=title,
        description=text,
        svg=line_chart([*lines, *levels], **labels, identity=identity, title=title, text=text),
        legend=[(name, swatch(found[0].style, kinds[found[0].style])) for name, found in series.items()],
        table=_axis_table(series, axis, metric, title),
    )


def _axis_table(series: Mapping[str, Sequence[System]], axis: str, main: str, title: str) -> Table:
    """Places as rows, systems as columns."""
    spreads = [spread for members in series.values() for s in members if (spread := s.spread(main)) is not None]
    decimals = decimals_for([spread.mean for spread in spreads])
    measures = [m for members in series.values() for system in members for m in system.measures(main)]
    higher = all(measure.higher_is_better for measure in measures)
    places = sorted({s.place for members in series.values() for s in members}, key=lambda place: place or 0.0)
    rows = []
    for place in places:
        values = []
        for members in series.values():
            found = next((system for system in members if system.place == place), None)
            values.append(Value(MISSING) if found is None else score_value(found, main, decimals))
        rows.append([Value("–" if place is None else short(place)), *mark_best(values, higher=higher)])
    return Table(f"{title}: the figures", [Column(words(axis)), *(Column(name) for name in series)], rows)
