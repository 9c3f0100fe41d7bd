"""The systems that are compared, and the tables of their scores and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from prefixtune.pages.document import Column, Listing, Section, Table, Value
from prefixtune.pages.format import MISSING, count, decimals_for, duration, fixed, metric_name, signed, size
from prefixtune.report.run import Run, losses_of
from prefixtune.results import Evaluation, Score

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
    _Cost("dev_loss", "dev. loss", "per token", lambda value: fixed(value, 3)),
    _Cost("evaluate_seconds", "evaluation", "time", duration),
)


@dataclass(frozen=True)
class System:
    """One run that is compared with others; `style` is the index of its colour."""

    name: str
    run: Run
    style: int = 0

    @property
    def evaluation(self) -> Evaluation | None:
        """Of the run, if it was evaluated."""
        return self.run.evaluation

    def score(self, metric: str, group: Group | None = None) -> Score | None:
        """A metric on all examples or on a group of them; None: it is missing or not finite."""
        if self.evaluation is None:
            return None
        scores = self.evaluation.scores
        if group is not None:
            part = self.evaluation.groups.get(group[0], {}).get(group[1])
            scores = {} if part is None else part.scores
        score = scores.get(metric)
        return None if score is None or not math.isfinite(score.score) else score

    @cached_property
    def costs(self) -> dict[str, float]:
        """What the run cost, as far as its log and files say."""
        run, figures = self.run, dict[str, float | None](file_bytes=self.run.file_bytes)
        for event in run.events:
            if event.get("event") == "start":
                figures["trained_parameters"] = event.get("num_trained")
                figures["stored_parameters"] = event.get("num_stored")
            if event.get("event") == "evaluation":
                figures["dev_loss"] = event.get("best_loss", event.get("loss"))
        steps, seconds = losses_of(run.events, "step", "seconds")
        if steps:
            figures["steps"], figures["train_seconds"] = steps[-1], sum(seconds)
        if run.evaluation is not None:
            figures["evaluate_seconds"] = run.evaluation.seconds
        return {key: float(value) for key, value in figures.items() if value is not None and math.isfinite(value)}


def metric_keys(systems: Iterable[System], main: str = "") -> list[str]:
    """Every metric, the main one first."""
    names = dict.fromkeys(name for system in systems if system.evaluation for name in system.evaluation.scores)
    return sorted(names, key=lambda name: name != main)


def main_metric(systems: Iterable[System]) -> str:
    """The first metric; empty: there is none."""
    return next(iter(metric_keys(systems)), "")


def lower_is_better(systems: Sequence[System], metric: str) -> str:
    """The small print of a metric's column."""
    return "" if _is_higher_better(systems, metric) else "lower is better"


def _is_higher_better(systems: Sequence[System], metric: str) -> bool:
    return all(score.higher_is_better for system in systems if (score := system.score(metric)))


def best_values(systems: Sequence[System], metric: str) -> list[Value]:
    """A metric of each system with its interval, the best one marked."""
    scores = [system.score(metric) for system in systems]
    decimals = decimals_for([score.score for score in scores if score is not None])
    values = []
    for score in scores:
        if score is None:
            values.append(Value(MISSING))
            continue
        span = score.interval
        small = "" if span is None else f"[{fixed(span[0], decimals)}, {fixed(span[1], decimals)}]"
        values.append(Value(fixed(score.score, decimals), small, score.score, interval=span))
    return mark_best(values, higher=_is_higher_better(systems, metric))


def mark_best(values: Sequence[Value], *, higher: bool) -> list[Value]:
    """Mark the best of several values, and those that read the same.

    The best is significant where it differs from every other by more than chance.
    """
    known = [value for value in values if value.number is not None]
    if len({value.text for value in known}) < 2:
        return list(values)
    best = (max if higher else min)(known, key=lambda value: value.number or 0.0)
    apart = all(other is best or _is_apart(best, other) for other in known)
    return [
        replace(value, best=True, significant=value is best and apart)
        if value.number is not None and value.text == best.text
        else value
        for value in values
    ]


def _is_apart(one: Value, other: Value) -> bool:
    """Whether the 95 % interval of the difference excludes 0; it is made of both intervals (Zou & Donner 2008)."""
    (above, over), (below, under) = sorted(
        ((value.number or 0.0, value.interval) for value in (one, other)), key=lambda pair: pair[0], reverse=True
    )
    return over is not None and under is not None and above - below > math.hypot(above - over[0], under[1] - below)


def scores_section(systems: Sequence[System], main: str) -> Section:
    """Scores with their intervals, what each system cost, and how to read it."""
    columns = [Column("system", [Value(system.name) for system in systems], numeric=False)]
    scores = [
        Column(metric_name(metric), best_values(systems, metric), lower_is_better(systems, metric))
        for metric in metric_keys(systems, main)
    ]
    columns += [*scores, *_cost_columns(systems)]
    table = Table("Scores, and what they cost" if main else "The result of each run", columns)
    values = [value for column in columns for value in column.values]
    notes = []
    if any(value.best for value in values):
        notes.append(f"Bold: the best of its column. {STAR}")
    if any(value.small.startswith("[") for value in values):
        notes.append("In brackets: the confidence interval of a score.")
    notes += _implementations(systems)
    left_out = {(key, why): None for s in systems if s.evaluation for key, why in s.evaluation.left_out.items()}
    notes += [f"{metric_name(metric)} was left out: {reason}" for metric, reason in left_out]
    notes += [line for system in systems for line in _comparisons(system)]
    return Section("Scores" if main else "Runs", [table, Listing(notes)] if notes else [table])


def _cost_columns(systems: Sequence[System]) -> Iterator[Column]:
    """The costs that are known for any system."""
    for cost in _COSTS:
        figures = [(system.costs.get(cost.key), system.costs.get(cost.also)) for system in systems]
        if any(figure is not None for pair in figures for figure in pair):
            values = [
                Value(cost.write(main), "" if also is None else f"{count(also)} {cost.unit}", main)
                for main, also in figures
            ]
            marked = mark_best(values, higher=False) if cost.key == "dev_loss" else values
            yield Column(cost.name, marked, cost.small)


def _comparisons(system: System) -> Iterator[str]:
    """What paired tests against the outputs of another system gave."""
    other = system.evaluation.against if system.evaluation else None
    if other is None:
        return
    for metric, test in other.comparison.items():
        difference, p_value = signed(test.difference, 4), fixed(test.p_value, 4)
        yield f"{system.name} minus {other.outputs}, {metric_name(metric)}: {difference}, p = {p_value} ({test.method})"


def _implementations(systems: Sequence[System]) -> list[str]:
    """What computed each metric; and a warning where the systems differ in it."""
    lines = []
    for metric in metric_keys(systems):
        names = sorted({score.implementation for s in systems if (score := s.score(metric))} - {""})
        if names:
            lines.append(f"{metric_name(metric)}: {'; or '.join(names)}")
        if len(names) > 1:
            lines[-1] += ". These are different implementations: their scores may not be comparable."
    return lines
