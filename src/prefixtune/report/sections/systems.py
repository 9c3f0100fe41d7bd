"""The systems that are compared, each with its repetitions, and the tables that studies and comparisons share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prefixtune.pages.document import Column, Facts, Listing, Section, Table, Value
from prefixtune.pages.format import (
    MISSING,
    Spread,
    count,
    decimals_for,
    duration,
    fixed,
    metric_name,
    short,
    size,
    words,
)
from prefixtune.report.results import Evaluation, Run, Score, losses_of

__all__ = [
    "System",
    "best_values",
    "figures_of",
    "headline",
    "lower_is_better",
    "main_metric",
    "mark_best",
    "metric_keys",
    "score_values",
    "scores_section",
    "scores_table",
]


STAR = "★: better than each other one by more than chance; the 95 % interval of the difference excludes 0."
Group = tuple[str, str]
"""A part of the data: its kind and name."""


@dataclass(frozen=True)
class _Cost:
    """A column with a figure, and perhaps a second one in small print under it."""

    key: str
    name: str
    small: str
    write: Callable[[float | None], str]
    also: str = ""
    unit: str = ""


_COSTS = (
    _Cost("trained_parameters", "parameters", "trained", count, "stored_parameters", "stored"),
    _Cost("file_bytes", "file", "size", size),
    _Cost("train_seconds", "training", "time", duration, "steps", "steps"),
    _Cost("peak_memory_mib", "memory", "peak, MiB", count),
    _Cost("dev_loss", "dev. loss", "per token", lambda value: fixed(value, 3)),
    _Cost("evaluate_seconds", "evaluation", "time", duration),
)


@dataclass(frozen=True)
class System:
    """One thing that is compared with others.

    Attributes:
        name: A method, or whatever varies.
        runs: Its finished repetitions.
        figures: The costs of each repetition.
        num_planned: Repetitions that the study plans.
        axis: The study's axis.
        axis_value: Its value on the axis; None where it has none.
        style: Index of its colour.
    """

    name: str
    runs: Sequence[Run] = ()
    figures: Sequence[Mapping[str, float]] = ()
    num_planned: int = 1
    axis: str = ""
    axis_value: float | None = None
    style: int = 0

    @property
    def label(self) -> str:
        """Its name, and its value on the axis."""
        return self.name if self.axis_value is None else f"{self.name}, {words(self.axis)} {short(self.axis_value)}"

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations of the repetitions that have one."""
        return [run.evaluation for run in self.runs if run.evaluation is not None]

    def scores(self, metric: str, group: Group | None = None) -> list[Score]:
        """A metric's finite scores, on all examples or on a group of them."""
        finite = []
        for evaluation in self.evaluations:
            scores = evaluation.scores
            if group is not None:
                part = evaluation.groups.get(group[0], {}).get(group[1])
                scores = {} if part is None else part.scores
            score = scores.get(metric)
            if score is not None and score.score is not None:
                finite.append(score)
        return finite

    def spread(self, metric: str, group: Group | None = None) -> Spread | None:
        """A metric over the repetitions."""
        return Spread.of([s.score for s in self.scores(metric, group) if s.score is not None])

    def span(self, metric: str, group: Group | None = None) -> tuple[float, float] | None:
        """What an error bar shows: lowest and highest of several repetitions, the interval of a single one."""
        scores = self.scores(metric, group)
        spread = self.spread(metric, group)
        if spread is None or spread.count == 1:
            return scores[0].interval if scores else None
        return spread.low, spread.high

    def cost(self, key: str) -> float | None:
        """The mean over the repetitions that have it."""
        spread = Spread.of([figures[key] for figures in self.figures if key in figures])
        return None if spread is None else spread.mean


def figures_of(run: Run) -> dict[str, float]:
    """What a run cost, as far as its log and files say."""
    figures: dict[str, float | None] = {"file_bytes": run.file_bytes}
    steps, _ = losses_of(run.events, "step")
    for event in run.events:
        if event.get("event") == "start":
            figures["trained_parameters"] = event.get("num_trained")
            figures["stored_parameters"] = event.get("num_stored")
        if event.get("event") == "evaluation":
            figures["dev_loss"] = event.get("best_loss", event.get("loss"))
    if steps:
        seconds = {e["step"]: e["seconds"] for e in run.events if e.get("event") == "step" and e.get("seconds")}
        figures["steps"], figures["train_seconds"] = steps[-1], sum(seconds.values()) or None
    if run.evaluation is not None:
        figures["evaluate_seconds"] = run.evaluation.seconds
    return {key: float(value) for key, value in figures.items() if value is not None and value == value}


def main_metric(systems: Iterable[System], preferred: str = "") -> str:
    """The preferred metric where any system has it, else the first one; empty: there is none."""
    names = metric_keys(systems, preferred)
    return names[0] if names else ""


def metric_keys(systems: Iterable[System], main: str) -> list[str]:
    """Every metric, the main one first."""
    names = dict.fromkeys(name for system in systems for each in system.evaluations for name in each.scores)
    return sorted(names, key=lambda name: name != main)


def lower_is_better(systems: Sequence[System], metric: str) -> str:
    """The small print of a metric's column."""
    return "" if _is_higher_better(systems, metric) else "lower is better"


def _is_higher_better(systems: Sequence[System], metric: str) -> bool:
    """Whether higher is better."""
    return all(score.higher_is_better for system in systems for score in system.scores(metric))


def score_values(systems: Sequence[System], metric: str, group: Group | None = None) -> list[Value]:
    """A metric of each system: a score with its interval, or the mean with the spread; not yet marked."""
    spreads = [system.spread(metric, group) for system in systems]
    decimals = decimals_for([spread.mean for spread in spreads if spread is not None])
    values = []
    for system, spread in zip(systems, spreads, strict=True):
        span = system.span(metric, group)
        if spread is None:
            values.append(Value(MISSING))
        elif spread.deviation is None:
            small = "" if span is None else f"[{fixed(span[0], decimals)}, {fixed(span[1], decimals)}]"
            values.append(Value(fixed(spread.mean, decimals), small, spread.mean, interval=span))
        else:
            text = f"{fixed(spread.mean, decimals)} ± {fixed(spread.deviation, decimals)}"
            small = f"{fixed(spread.low, decimals)} to {fixed(spread.high, decimals)}"
            values.append(Value(text, small, spread.mean, interval=spread.interval))
    return values


def best_values(systems: Sequence[System], metric: str, group: Group | None = None) -> list[Value]:
    """A metric of each system, the best one marked."""
    return mark_best(score_values(systems, metric, group), higher=_is_higher_better(systems, metric))


def mark_best(values: Sequence[Value], *, higher: bool) -> list[Value]:
    """Mark the best of several values, and those that read the same.

    The best is significant where it differs from every other by more than chance.
    """
    known = [value for value in values if value.number is not None]
    if len({_figure(value) for value in known}) < 2:
        return list(values)
    best = (max if higher else min)(known, key=lambda value: value.number or 0.0)
    apart = all(other is best or _is_apart(best, other) for other in known)
    return [
        replace(value, best=True, significant=value is best and apart)
        if value.number is not None and _figure(value) == _figure(best)
        else value
        for value in values
    ]


def _figure(value: Value) -> str:
    return value.text.split(" ")[0]


def _is_apart(one: Value, other: Value) -> bool:
    """Whether the 95 % interval of the difference excludes 0; it is made of both intervals (Zou & Donner 2008)."""
    (above, over), (below, under) = sorted(
        ((value.number or 0.0, value.interval) for value in (one, other)), key=lambda pair: pair[0], reverse=True
    )
    return over is not None and under is not None and above - below > math.hypot(above - over[0], under[1] - below)


def _best_at_each(systems: Sequence[System], metric: str) -> list[Value]:
    """A metric of each system, the best among those with the same value on the axis marked; of one series, of all."""
    values, higher = score_values(systems, metric), _is_higher_better(systems, metric)
    if not _has_several_series(systems):
        return mark_best(values, higher=higher)
    marked = dict[int, Value]()
    for along in {system.axis_value for system in systems}:
        indices = [index for index, system in enumerate(systems) if system.axis_value == along]
        marked |= dict(zip(indices, mark_best([values[index] for index in indices], higher=higher), strict=True))
    return [marked[index] for index in range(len(values))]


def _has_several_series(systems: Sequence[System]) -> bool:
    return len({system.name for system in systems if system.axis_value is not None}) > 1


def scores_table(systems: Sequence[System], main: str, caption: str, axis: str = "", what: str = "system") -> Table:
    """Scores with their intervals or spreads, and what each system cost."""
    columns = [Column(what, [Value(system.name) for system in systems], numeric=False)]
    if axis:
        along = [system.axis_value for system in systems]
        columns.append(Column(words(axis), [Value("–" if x is None else short(x), number=x) for x in along]))
    if any(system.num_planned > 1 or len(system.runs) < system.num_planned for system in systems):
        counts = [Value(f"{len(s.runs)} of {s.num_planned}", number=len(s.runs)) for s in systems]
        columns.append(Column("runs", counts, "done of planned"))
    scores = [
        Column(metric_name(metric), _best_at_each(systems, metric), lower_is_better(systems, metric))
        for metric in metric_keys(systems, main)
    ]
    for group in (scores, list(_cost_columns(systems))):
        columns += [replace(column, begins_group=index == 0) for index, column in enumerate(group)]
    return Table(caption, columns, num_headers=2 if axis else 1)


def _cost_columns(systems: Sequence[System]) -> Iterator[Column]:
    """The costs that are known for any system."""
    for cost in _COSTS:
        figures = [(system.cost(cost.key), system.cost(cost.also)) for system in systems]
        if any(figure is not None for pair in figures for figure in pair):
            values = [
                Value(cost.write(main), "" if also is None else f"{count(also)} {cost.unit}", main)
                for main, also in figures
            ]
            yield Column(cost.name, values, cost.small)


def _implementations(systems: Sequence[System]) -> list[str]:
    """What computed each metric; and a warning where the systems differ in it."""
    lines = []
    for metric in metric_keys(systems, ""):
        names = sorted({score.implementation for system in systems for score in system.scores(metric)} - {""})
        if names:
            lines.append(f"{metric_name(metric)}: {'; or '.join(names)}")
        if len(names) > 1:
            lines[-1] += ". These are different implementations: their scores may not be comparable."
    return lines


def scores_section(systems: Sequence[System], main: str, axis: str = "", what: str = "system") -> Section:
    """The table of scores, and how to read it."""
    caption = "Scores, and what they cost" if main else "The result of each run"
    table = scores_table(systems, main, caption, axis, what)
    values = [value for column in table.columns for value in column.values]
    notes = []
    if any(value.best for value in values):
        among = f", among those of the same {words(axis)}" if _has_several_series(systems) else ""
        notes.append(f"Bold: the best of its column{among}. {STAR}")
    if any(value.small.startswith("[") for value in values):
        notes.append("In brackets: the confidence interval of a single run's score.")
    if any(len(system.runs) > 1 for system in systems):
        notes.append("Of several runs: the mean ± the standard deviation, and the lowest to the highest; costs: means.")
    notes += _implementations(systems)
    left_out = {(key, str(why)): None for s in systems for e in s.evaluations for key, why in e.left_out.items()}
    notes += [f"{metric_name(metric)} was left out: {reason}" for metric, reason in left_out]
    return Section("Scores" if main else "Runs", [table, Listing(notes)] if notes else [table])


def headline(systems: Sequence[System], main: str, where: str = "") -> Facts | None:
    """The main figure of each system."""
    scored = [system for system in systems if system.scores(main)]
    items = []
    for system, value in zip(scored, best_values(scored, main), strict=True):
        text, _, deviation = value.text.partition(" ")
        small = f"{deviation}, {len(system.scores(main))} runs" if deviation else value.small
        items.append((system.name, replace(value, text=text, small=small)))
    lower = "" if _is_higher_better(scored, main) else ", lower is better"
    return Facts(items, f"{metric_name(main)}{where}{lower}") if items else None
