"""Figures with their goals: the table that a benchmark prints, and the JSON file that it writes."""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from prefixtune.errors import PrefixError
from prefixtune.utils.console import Console, format_figure, format_seconds
from prefixtune.utils.files import write_text

FOLDER = Path(__file__).resolve().parent / "results"
"""Where results go."""

Log = Callable[[str], None]
"""Shows a line of progress."""


class DifferenceError(Exception):
    """Two sides do not compute the same, so a comparison of speed would mean nothing."""


class PeerError(Exception):
    """A program to compare with is missing, or stopped; the text says why, in one line."""


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        part: The part that measured it.
        name: The figure's name.
        value: The figure; None: it was not measured.
        unit: Its unit; empty for none.
        at_least: The goal: no less than this.
        at_most: The goal: no more than this.
        reason: Why it was not measured.
    """

    part: str
    name: str
    value: float | None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    reason: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is no goal, or no figure."""
        if self.value is None:
            return None
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def cells(self) -> list[str | None]:
        """For the table."""
        if self.value is None:
            return [self.part, self.name, f"not measured: {self.reason}", None, None]
        goal = None
        if self.at_least is not None:
            goal = f">= {self.at_least:g}"
        elif self.at_most is not None:
            goal = f"<= {self.at_most:g}"
        value = f"{format_figure(self.value)} {self.unit}".rstrip()
        return [self.part, self.name, value, goal, {True: "reached", False: "missed", None: None}[self.reached]]

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "part": self.part,
            "what": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": {"at_least": self.at_least, "at_most": self.at_most} if self.reached is not None else None,
            "reached": self.reached,
            **({"not_measured": self.reason} if self.value is None else {}),
        }


Results = tuple[dict[str, Any], list[Figure]]
"""Everything that was measured, for the file; and the table's lines."""


def run_benchmark(options: argparse.Namespace, measure: Callable[[Console], Results]) -> int:
    """Measure, print the table, and write every figure with what it was measured on; returns the exit code.

    Args:
        options: With `quick`, `repeats`, `backbone` and `json` (the file to write).
        measure: Measures.
    """
    console, load, began = Console(), machine.BackgroundLoad(), time.monotonic()
    if load.busy_at_start:
        console.warn(f"the machine is busy (load average {load.load_average:.2f}); do not take the figures seriously.")
    if options.quick:
        console.warn("--quick only shows that the benchmark works; do not take its figures seriously.")
    try:
        values, figures = measure(console)
    except PrefixError as error:
        console.error(error.message, error.hint)
        return 2
    except DifferenceError as error:
        console.error(str(error), "a comparison of speed would mean nothing; nothing was written.")
        return 1
    except PeerError as error:
        console.error(f"a peer stopped: {error}", "leave it out, or its part; nothing was written.")
        return 1
    seconds, others = time.monotonic() - began, load.cores()
    console.table("", ["part", "figure", "value", "goal", ""], [figure.cells() for figure in figures], result=True)
    if others is not None and others > machine.BUSY_CORES:
        console.warn(f"other processes kept {others:.1f} cores busy; do not take the figures seriously.")
    settings = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "repeats": options.repeats,
        "backbone": options.backbone,
        "seconds": round(seconds, 1),
        "load_average_at_start": load.load_average,
    }
    write_results(options.json, load, {**settings, **values, "summary": [figure.to_dict() for figure in figures]})
    reached, missed = (sum(figure.reached is state for figure in figures) for state in (True, False))
    console.info(f"{reached} goals reached, {missed} missed, in {format_seconds(seconds)}; {options.json}")
    return 0


def write_results(path: Path, load: machine.BackgroundLoad, values: dict[str, Any]) -> None:
    """Write figures as JSON, with the command and the machine."""
    others = {"cores_used_by_others": load.cores()}
    write_text(
        path, json.dumps({"command": machine.command_line(), **others, **machine.describe(), **values}, indent=1) + "\n"
    )
