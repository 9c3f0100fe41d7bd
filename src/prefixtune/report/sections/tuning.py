"""What was tried for each point of a study, by development loss, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefixtune.report.document import Block, Column, Section, Table, Text, Value
from prefixtune.report.format import fixed, words
from prefixtune.report.sections.systems import mark_best

__all__ = ["tuning_section"]


def tuning_section(tuning: Mapping[str, Any]) -> Section | None:
    """A table of all values that were tried; None where there are none.

    Args:
        tuning: `{point: {setting: {value: loss}, "chosen": value}}`; anything else is ignored.
    """
    rows: list[tuple[str, str, str, Value, str]] = []
    at_edge = []
    entries = [(point, entry) for point, entry in tuning.items() if isinstance(entry, Mapping)]
    for point, setting, losses, entry in ((p, key, value, e) for p, e in entries for key, value in e.items()):
        if not isinstance(losses, Mapping):
            continue
        names = sorted(losses, key=_as_number)
        chosen = next((name for name in names if _is_same(name, entry.get("chosen"))), None)
        values = mark_best([_loss(losses[name]) for name in names], higher=False)
        rows += [
            (point, words(setting), name, value, "chosen" if name == chosen else "")
            for name, value in zip(names, values, strict=True)
        ]
        if len(names) > 1 and chosen in (names[0], names[-1]):
            at_edge.append(f"{point}: {words(setting)} {chosen}")
    if not rows:
        return None
    points, settings, tried, losses, choices = zip(*rows, strict=True)
    columns = [
        Column("method", [Value(point) for point in points], numeric=False),
        Column("setting", [Value(setting) for setting in settings], numeric=False),
        Column("tried", [Value(name, number=_as_number(name)) for name in tried]),
        Column("development loss", losses),
        Column("choice", [Value(choice) for choice in choices], numeric=False),
    ]
    blocks: list[Block] = [Table("Tried before the study, by development loss", columns, num_headers=3)]
    if at_edge:
        blocks.append(
            Text(f"Chosen at the edge of what was tried, so that a better one may lie beyond: {'; '.join(at_edge)}.")
        )
    return Section("Tuning", blocks)


def _loss(loss: Any) -> Value:
    known = isinstance(loss, float | int) and -1e300 < loss < 1e300
    return Value(fixed(loss, 4), number=loss) if known else Value(fixed(None))


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _is_same(name: str, chosen: Any) -> bool:
    return name == str(chosen) or _as_number(name) == _as_number(str(chosen)) < math.inf
