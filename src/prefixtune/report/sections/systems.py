"""The systems that are compared, each with its repetitions, and the tables that studies and comparisons share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prefixtune.report.document import Column, Headline, Listing, Section, Table, Value
from prefixtune.report.format import (
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
    "figures_of",
    "headline",
    "implementations",
    "is_higher_better",
    "main_metric",
    "mark_best",
    "metric_keys",
    "score_value",
    "scores_section",
    "scores_table",
]


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
    runs: Sequence[Run]
    figures: Sequence[Mapping[str, float]]
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

    def scores(self, metric: str, group: tuple[str, str] | None = None) -> list[Score]:
        """A metric's finite scores, on all examples or on a group of them (its kind and name)."""
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

    def spread(self, metric: str, group: tuple[str, str] | None = None) -> Spread | None:
        """A metric over the repetitions."""
        return Spread.of([s.score for s in self.scores(metric, group) if s.score is not None])

    def span(self, metric: str, group: tuple[str, str] | None = None) -> tuple[float, float] | None:
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


def is_higher_better(systems: Sequence[System], metric: str) -> bool:
    """Whether higher is better."""
    return all(score.higher_is_better for system in systems for score in system.scores(metric))


def score_value(system: System, metric: str, decimals: int, group: tuple[str, str] | None = None) -> Value:
    """A score with its interval, or the mean with the spread of several repetitions."""
    spread = system.spread(metric, group)
    if spread is None:
        return Value(MISSING)
    text, span = fixed(spread.mean, decimals), system.span(metric, group)
    if spread.deviation is not None:
        text = f"{text} ± {fixed(spread.deviation, decimals)}"
        small = f"{fixed(spread.low, decimals)} to {fixed(spread.high, decimals)}"
    else:
        small = "" if span is None else f"[{fixed(span[0], decimals)}, {fixed(span[1], decimals)}]"
    return Value(text, small, spread.mean, interval=span if spread.interval is None else spread.interval)


def mark_best(values: Sequence[Value], *, higher: bool) -> list[Value]:
    """Mark the best of several values, and those that read the same.

    The best is significant where its interval and that of every other do not overlap.
    """
    known = [(value, value.number) for value in values if value.number is not None]
    if len({_figure(value) for value, _ in known}) < 2:
        return list(values)
    sign = 1 if higher else -1
    best, _ = max(known, key=lambda pair: sign * pair[1])
    others = [value for value, _ in known if value is not best]
    apart = all(_is_apart(best, other, higher=higher) for other in others)
    return [
        replace(value, best=True, significant=value is best and apart)
        if value.number is not None and _figure(value) == _figure(best)
        else value
        for value in values
    ]


def _figure(value: Value) -> str:
    return value.text.split(" ")[0]


def _is_apart(best: Value, other: Value, *, higher: bool) -> bool:
    if best.interval is None or other.interval is None:
        return False
    return best.interval[0] > other.interval[1] if higher else best.interval[1] < other.interval[0]


def _marked(systems: Sequence[System], values: Sequence[Value], *, higher: bool) -> list[Value]:
    """Mark the best among the systems with the same value on the axis; of a single series, the best of all."""
    if not _has_several_series(systems):
        return mark_best(values, higher=higher)
    result = list(values)
    for axis_value in {system.axis_value for system in systems}:
        indices = [index for index, system in enumerate(systems) if system.axis_value == axis_value]
        for index, value in zip(indices, mark_best([values[i] for i in indices], higher=higher), strict=True):
            result[index] = value
    return result


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
    for index, metric in enumerate(metric_keys(systems, main)):
        higher = is_higher_better(systems, metric)
        means = [spread.mean for system in systems if (spread := system.spread(metric)) is not None]
        values = [score_value(system, metric, decimals_for(means)) for system in systems]
        values, small = _marked(systems, values, higher=higher), "" if higher else "lower is better"
        columns.append(Column(metric_name(metric), values, small, begins_group=index == 0))
    costs = list(_cost_columns(systems))
    columns += [replace(column, begins_group=index == 0) for index, column in enumerate(costs)]
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


def implementations(systems: Sequence[System]) -> list[str]:
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
    table = scores_table(systems, main, "Scores, and what they cost", axis, what)
    values = [value for column in table.columns for value in column.values]
    notes = []
    if any(value.best for value in values):
        among = f", among those of the same {words(axis)}" if _has_several_series(systems) else ""
        notes.append(f"Bold: the best of its column{among}. ★: significant; its interval overlaps with no other.")
    if any(score.interval for system in systems if len(system.runs) == 1 for score in _all_scores(system)):
        notes.append("In brackets: the confidence interval of a single run's score.")
    if any(len(system.runs) > 1 for system in systems):
        notes.append(
            "Of several runs: the mean ± the standard deviation, and the lowest to the highest; costs: means. Their "
            "interval, for ★, is the 95 % interval of the mean."
        )
    notes += implementations(systems)
    left_out = {(key, str(why)): None for s in systems for e in s.evaluations for key, why in e.left_out.items()}
    notes += [f"{metric_name(metric)} was left out: {reason}" for metric, reason in left_out]
    return Section("Scores", [table, Listing(notes)] if notes else [table])


def _all_scores(system: System) -> list[Score]:
    return [score for metric in metric_keys([system], "") for score in system.scores(metric)]


def headline(systems: Sequence[System], main: str, where: str = "") -> Headline | None:
    """The main figure of each system."""
    spreads = [(system, spread) for system in systems if (spread := system.spread(main)) is not None]
    if not spreads:
        return None
    decimals, higher = decimals_for([spread.mean for _, spread in spreads]), is_higher_better(systems, main)
    values = []
    for system, spread in spreads:
        value = score_value(system, main, decimals)
        small = f"± {fixed(spread.deviation, decimals)}, {spread.count} runs" if spread.deviation is not None else ""
        values.append(replace(value, text=fixed(spread.mean, decimals), small=small or value.small))
    marked = zip(spreads, mark_best(values, higher=higher), strict=True)
    lower = "" if higher else ", lower is better"
    return Headline(f"{metric_name(main)}{where}{lower}", [(system.name, value) for (system, _), value in marked])
