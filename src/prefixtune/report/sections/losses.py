"""Losses over the optimizer steps of runs, in one curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefixtune.report.document import NUM_STYLES, Block, Chart, Charts, Column, Details, Section, Series, Table, Value
from prefixtune.report.format import count, fixed, spread_out
from prefixtune.report.results import Run, losses_of
from prefixtune.report.sections.systems import System

__all__ = ["losses_section", "run_series", "smooth"]


MOST_ROWS = 24
STEP = "optimizer step"


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
        return Section("Losses", [Charts([_single_chart(trained[0].label, runs[0], key, unit)])])
    groups = [trained[start : start + NUM_STYLES] for start in range(0, len(trained), NUM_STYLES)]
    first, *rest = [Charts(list(_overlaid(group, index, key, unit))) for index, group in enumerate(groups)]
    more: list[Block] = [Details(f"{len(trained) - NUM_STYLES} more loss curves", rest)] if rest else []
    return Section("Losses", [first, *more])


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
    columns = [Column("step", [Value(count(step), number=step) for step in steps])]
    for head, values in (("training, smoothed", training), ("development", development)):
        shown = [Value(fixed(values[step], 3) if step in values else "", number=values.get(step)) for step in steps]
        columns.append(Column(head, shown))
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
        Column("run", [Value(name) for name, _, _ in rows], numeric=False),
        Column("step", [Value(count(step), number=step) for _, step, _ in rows]),
        Column("loss", [Value(fixed(loss, 3), number=loss) for _, _, loss in rows]),
    ]
    return Table(f"{title}: the figures", columns)


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
