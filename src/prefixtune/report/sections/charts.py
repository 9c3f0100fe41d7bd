"""The sections with charts: scores over a number, scores by parts of the data, losses over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefixtune.pages.document import NUM_STYLES, Block, Chart, Column, Section, Series, Table, numbers, texts
from prefixtune.pages.format import count, fixed, metric_name, natural, short, spread_out, words
from prefixtune.report.results import Run, losses_of
from prefixtune.report.sections.systems import System, best_values, lower_is_better, metric_keys

__all__ = ["axis_section", "groups_section", "losses_section", "run_series", "smooth"]


MOST_SYSTEMS, MOST_DOTS = 30, 300
"""Of a chart of parts of the data."""
MOST_ROWS = 24
"""Rows of a table of losses."""
STEP = "optimizer step"
_KINDS = {"seen": "whether the category was seen in training", "triples": "number of triples"}


def axis_section(systems: Sequence[System], axis: str, main: str) -> Section | None:
    """Every metric over a study's numeric factor."""
    if not axis:
        return None
    charts = [_axis_chart(systems, axis, metric) for metric in metric_keys(systems, main)]
    drawn = tuple(chart for chart in charts if chart is not None)
    return Section(f"Scores over {words(axis)}", [drawn]) if drawn else None


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
    along = sorted({s.axis_value for members in by_name.values() for s in members}, key=lambda value: value or 0.0)
    rows = []
    for x in along:
        chosen = [next((s for s in members if s.axis_value == x), System(name)) for name, members in by_name.items()]
        rows.append(best_values(chosen, metric))
    columns = [numbers(words(axis), along, lambda value: "–" if value is None else short(value))]
    columns += [Column(name, [row[index] for row in rows]) for index, name in enumerate(by_name)]
    return Table(f"{title}: the figures", columns)


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
    charts = tuple(_group_chart(systems, main, kind, of) for kind, of in ordered.items())
    tables: list[Block] = [
        _group_table(systems, sorted(metrics[kind], key=lambda name: name != main), kind, list(of))
        for kind, of in ordered.items()
        if len(metrics[kind]) > 1
    ]
    more = [Section("Every metric, part by part", tables, folded=True)] if tables else []
    return Section("Parts of the data", [charts, *more])


def _title(kind: str) -> str:
    return _KINDS.get(kind, words(kind))


def _group_chart(systems: Sequence[System], main: str, kind: str, sizes: Mapping[str, int]) -> Chart:
    drawn = list(sizes)[: max(1, MOST_DOTS // len(systems))]
    series = []
    for system in systems[:MOST_SYSTEMS]:
        spreads = [(row, system.spread(main, (kind, name)), name) for row, name in enumerate(drawn)]
        dots = [(s.mean, row, system.span(main, (kind, name)) or (s.mean, s.mean)) for row, s, name in spreads if s]
        if dots:
            ranges = [span for _, _, span in dots]
            series.append(Series(system.name, [(x, y) for x, y, _ in dots], system.style, ranges, "dots"))
    title = f"{metric_name(main)} by {_title(kind)}"
    text = f"{metric_name(main)} for each of {len(sizes)} parts, with its interval; the figures are in the table below."
    if len(drawn) < len(sizes) or len(systems) > MOST_SYSTEMS:
        text += f" Parts drawn: {len(drawn)}; systems drawn: {len(series)}."
    values = {name: best_values(systems, main, (kind, name)) for name in sizes}
    columns = [
        texts(words(kind), sizes),
        numbers("examples", sizes.values(), count),
        *(Column(s.name, [values[name][index] for name in sizes]) for index, s in enumerate(systems)),
    ]
    table = Table(f"{title}: the figures", columns)
    rows = [f"{name} ({sizes[name]:,})" for name in drawn]
    return Chart(title, text, series, metric_name(main), words(kind), table, rows)


def _group_table(systems: Sequence[System], metrics: Sequence[str], kind: str, names: Sequence[str]) -> Table:
    """A row for each part and system, a column for each metric."""
    columns = [
        texts(words(kind), [name for name in names for _ in systems]),
        texts("system", [system.name for _ in names for system in systems]),
    ]
    for metric in metrics:
        values = [value for name in names for value in best_values(systems, metric, (kind, name))]
        columns.append(Column(metric_name(metric), values, lower_is_better(systems, metric)))
    return Table(f"By {_title(kind)}", columns, num_headers=2)


def losses_section(systems: Sequence[System]) -> Section | None:
    """Training and development loss: of a single run in one chart; of several, all runs in each of two charts."""
    trained = [system for system in systems if any(run_series(run.events) for run in system.runs)]
    if not trained:
        return None
    runs = [run for system in trained for run in system.runs]
    # The development loss is per token.
    per_token = all("loss_per_token" in event for run in runs for event in run.events if event.get("event") == "step")
    key, unit = ("loss_per_token", "loss per token") if per_token else ("loss", "loss")
    if len(runs) == 1:
        return Section("Losses", [(_single_chart(trained[0].label, runs[0], key, unit),)])
    groups = [trained[start : start + NUM_STYLES] for start in range(0, len(trained), NUM_STYLES)]
    first, *rest = [tuple(_overlaid(group, index, key, unit)) for index, group in enumerate(groups)]
    more = Section(f"{len(trained) - NUM_STYLES} more loss curves", rest, folded=True)
    return Section("Losses", [first, more] if rest else [first])


def run_series(events: Sequence[Mapping[str, Any]], key: str = "loss") -> list[Series]:
    """The curves of one run: training loss, the same smoothed, development loss; those that it has."""
    steps, losses = losses_of(events, "step", key)
    development = list(zip(*losses_of(events, "evaluation"), strict=True))
    series = [
        Series("training", list(zip(steps, losses, strict=True)), 0, kind="faint"),
        Series("training, smoothed", list(zip(steps, smooth(losses), strict=True)), 0, kind="plain"),
        Series("development", development, 1),
    ]
    return [each for each in series if each.points]


def _single_chart(name: str, run: Run, key: str, unit: str) -> Chart:
    series = run_series(run.events, key)
    curves = {each.name: dict(each.points) for each in series}
    training, development = curves.get("training, smoothed", {}), curves.get("development", {})
    steps = sorted({*spread_out(sorted(development), MOST_ROWS), *spread_out(sorted(training), MOST_ROWS // 2)})
    columns = [numbers("step", steps, count)]
    for head, values in (("training, smoothed", training), ("development", development)):
        columns.append(numbers(head, [values.get(step) for step in steps], _loss))
    text = f"{unit} over the optimizer steps of 1 run."
    if development:
        last = development[max(development)]
        text += f" The lowest development loss is {fixed(min(development.values()), 3)}, the last {fixed(last, 3)}."
    return Chart(name, text, series, STEP, unit, Table(f"Losses of {name}", columns))


def _overlaid(systems: Sequence[System], group: int, key: str, unit: str) -> Iterator[Chart]:
    """The training losses of several runs in one chart, and their development losses in another."""
    for title, event in (("Training loss, smoothed", "step"), ("Development loss", "evaluation")):
        is_training, series = event == "step", list[Series]()
        for index, system in enumerate(systems):
            for run in system.runs:
                steps, losses = losses_of(run.events, event, key if is_training else "loss")
                if steps:
                    points = list(zip(steps, smooth(losses) if is_training else losses, strict=True))
                    series.append(Series(system.label, points, index, kind="plain" if is_training else "marked"))
        if series:
            title, label = f"{title} ({group + 1})" if group else title, unit if is_training else "loss per token"
            lowest = "; ".join(f"{each.name} {fixed(min(y for _, y in each.points), 3)}" for each in series)
            text = f"{label} over the optimizer steps of {len(series)} runs. The lowest: {lowest}."
            yield Chart(title, text, series, STEP, label, _overlaid_table(title, series))


def _overlaid_table(title: str, series: Sequence[Series]) -> Table:
    rows = [(each.name, step, loss) for each in series for step, loss in spread_out(each.points, MOST_ROWS // 2)]
    columns = [
        texts("run", [name for name, _, _ in rows]),
        numbers("step", [step for _, step, _ in rows], count),
        numbers("loss", [loss for _, _, loss in rows], _loss),
    ]
    return Table(f"{title}: the figures", columns)


def _loss(loss: float | None) -> str:
    return "" if loss is None else fixed(loss, 3)


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, nearer ones with more weight; over about a twentieth of the run.

    The weights always sum to one, so the line starts at the first value and not at zero.

    >>> smooth([4.0, 4.0, 4.0])
    [4.0, 4.0, 4.0]
    >>> smooth([])
    []
    """
    keep = 1 - 1 / max(2.0, len(values) / 20)
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result
