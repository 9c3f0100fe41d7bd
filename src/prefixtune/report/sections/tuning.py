"""What was tried for each point of a study, by development loss, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefixtune.report.document import Block, Column, Section, Table, Text, Value
from prefixtune.report.format import fixed, words
from prefixtune.report.sections.systems import mark_best

__all__ = ["tuning_section"]


@dataclass(frozen=True)
class _Trials:
    """The values of one setting that were tried.

    Attributes:
        point: The point of the grid, or the method.
        setting: The setting's name.
        losses: Value, as text -> development loss; None: not finite, or not reached.
        chosen: The value that was chosen; None: none of these.
    """

    point: str
    setting: str
    losses: Mapping[str, float | None]
    chosen: str | None


def tuning_section(tuning: Mapping[str, Any]) -> Section | None:
    """A table of all values that were tried; None where there are none."""
    rows: list[list[Value]] = []
    at_edge = []
    for trials in _read_trials(tuning):
        names = list(trials.losses)
        losses = [Value(fixed(loss, 4), number=loss) for loss in trials.losses.values()]
        for name, loss in zip(names, mark_best(losses, higher=False), strict=True):
            choice = "chosen" if name == trials.chosen else ""
            value = Value(name, number=_as_number(name))
            rows.append([Value(trials.point), Value(words(trials.setting)), value, loss, Value(choice)])
        if len(names) > 1 and trials.chosen in (names[0], names[-1]):
            at_edge.append(f"{trials.point}: {words(trials.setting)} {trials.chosen}")
    if not rows:
        return None
    columns = [Column("method", numeric=False), Column("setting", numeric=False), Column("tried")]
    columns += [Column("development loss"), Column("choice", numeric=False)]
    blocks: list[Block] = [Table("Tried before the study, by development loss", columns, rows, num_headers=3)]
    if at_edge:
        blocks.append(
            Text(f"Chosen at the edge of what was tried, so that a better one may lie beyond: {'; '.join(at_edge)}.")
        )
    return Section("Tuning", blocks)


def _read_trials(tuning: Mapping[str, Any]) -> Iterator[_Trials]:
    """`{point: {setting: {value: loss}, "chosen": value}}`; anything else is ignored."""
    for point, entry in tuning.items():
        for setting, losses in entry.items() if isinstance(entry, Mapping) else ():
            if not isinstance(losses, Mapping):
                continue
            names = sorted(losses, key=_as_number)
            chosen = next((name for name in names if _is_same(name, entry.get("chosen"))), None)
            yield _Trials(point, setting, {name: _finite(losses[name]) for name in names}, chosen)


def _finite(loss: Any) -> float | None:
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _is_same(name: str, chosen: Any) -> bool:
    return name == str(chosen) or (isinstance(chosen, int | float) and _as_number(name) == float(chosen))
