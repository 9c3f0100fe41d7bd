"""Charts: scores by parts of the data, and losses over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefixtune.pages.document import Chart, Section, Series
from prefixtune.pages.format import fixed, metric_name, natural, words
from prefixtune.report.run import Run, losses_of
from prefixtune.report.systems import System

MOST_PARTS = 60
"""Of a chart of parts of the data."""
STEP = "optimizer step"
_KINDS = {"seen": "whether the category was seen in training", "triples": "number of triples"}


def groups_section(systems: Sequence[System], main: str) -> Section | None:
    """Scores by category and the like: a chart of the main metric."""
    systems = [system for system in systems if system.evaluation is not None and system.evaluation.groups]
    sizes: dict[str, dict[str, int]] = {}
    for system in systems:
        for kind, groups in system.evaluation.groups.items() if system.evaluation else ():
            for name, group in groups.items():
                sizes.setdefault(kind, {}).setdefault(name, group.num_examples)
    if not sizes:
        return None
    ordered = {kind: {name: of[name] for name in sorted(of, key=natural)} for kind, of in sizes.items()}
    charts = tuple(_group_chart(systems, main, kind, of) for kind, of in ordered.items())
    return Section("Parts of the data", [charts])


def _title(kind: str) -> str:
    return _KINDS.get(kind, words(kind))


def _group_chart(systems: Sequence[System], main: str, kind: str, sizes: Mapping[str, int]) -> Chart:
    drawn = list(sizes)[:MOST_PARTS]
    series = []
    for system in systems:
        scores = [(row, score) for row, name in enumerate(drawn) if (score := system.score(main, (kind, name)))]
        dots = [(score.score, row) for row, score in scores]
        spans = [score.interval or (score.score, score.score) for _, score in scores]
        if dots:
            series.append(Series(system.name, dots, system.style, spans, "dots"))
    title = f"{metric_name(main)} by {_title(kind)}"
    text = f"{metric_name(main)} for {len(drawn)} of {len(sizes)} parts, with the number of examples."
    rows = [f"{name} ({sizes[name]:,})" for name in drawn]
    return Chart(title, text, series, metric_name(main), words(kind), rows)


def losses_section(systems: Sequence[System]) -> Section | None:
    """Training and development loss: of a single run in one chart; of several, all runs in each of two charts."""
    trained = [system for system in systems if _run_series(system.run.events)]
    if not trained:
        return None
    # The development loss is per token.
    steps = [event for system in trained for event in system.run.events if event.get("event") == "step"]
    key = "loss_per_token" if all("loss_per_token" in event for event in steps) else "loss"
    unit = "loss per token" if key == "loss_per_token" else "loss"
    if len(trained) == 1:
        return Section("Losses", [(_single_chart(trained[0].name, trained[0].run, key, unit),)])
    charts = tuple(_overlaid(trained, key, unit))
    return Section("Losses", [charts])


def _run_series(events: Sequence[Mapping[str, Any]], key: str = "loss") -> list[Series]:
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
    series = _run_series(run.events, key)
    text = f"{unit} over the optimizer steps of 1 run."
    development = dict(next((each.points for each in series if each.name == "development"), []))
    if development:
        last = development[max(development)]
        text += f" The lowest development loss is {fixed(min(development.values()), 3)}, the last {fixed(last, 3)}."
    return Chart(name, text, series, STEP, unit)


def _overlaid(systems: Sequence[System], key: str, unit: str) -> Iterator[Chart]:
    """The training losses of several runs in one chart, and their development losses in another."""
    for title, event in (("Training loss, smoothed", "step"), ("Development loss", "evaluation")):
        is_training, series = event == "step", list[Series]()
        for system in systems:
            steps, losses = losses_of(system.run.events, event, key if is_training else "loss")
            if steps:
                points = list(zip(steps, smooth(losses) if is_training else losses, strict=True))
                series.append(Series(system.name, points, system.style, kind="plain" if is_training else "marked"))
        if series:
            label = unit if is_training else "loss per token"
            lowest = "; ".join(f"{each.name} {fixed(min(y for _, y in each.points), 3)}" for each in series)
            text = f"{label} over the optimizer steps of {len(series)} runs. The lowest: {lowest}."
            yield Chart(title, text, series, STEP, label)


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
