"""Figures: the table that a benchmark prints, and the JSON file that it writes."""

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
from prefixtune.backbone.packaged import DEFAULT_BACKBONE
from prefixtune.errors import PrefixError
from prefixtune.utils.console import Console, format_figure, format_seconds, print_table
from prefixtune.utils.files import write_text

FOLDER = Path(__file__).resolve().parent / "results"
"""Where results go."""
ROOT = FOLDER.parents[1]

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
        reason: Why it was not measured.
    """

    part: str
    name: str
    value: float | None
    unit: str = ""
    reason: str = ""

    def shown(self) -> str:
        """The value with its unit, or why there is none."""
        if self.value is None:
            return f"not measured: {self.reason}"
        return f"{format_figure(self.value)} {self.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        missing = {"not_measured": self.reason} if self.value is None else {}
        return {"part": self.part, "what": self.name, "value": self.value, "unit": self.unit, **missing}


Results = tuple[dict[str, Any], list[Figure]]
"""Everything that was measured, for the file; and the table's lines."""


def make_parser(description: str | None, name: str, *, repeats: int, quick: int = 1) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    Args:
        description: The module's docstring.
        name: Of the results file.
        repeats: Timed rounds.
        quick: Timed rounds with `--quick`.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    rounds = f"timed rounds; a further one warms up (default {repeats}; quick: {quick})"
    parser.add_argument("--repeats", type=int, help=rounds)
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / f"{name}.json", help="where the figures go")
    parser.set_defaults(usual_repeats=(repeats, quick))
    return parser


def run_benchmark(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Log], Results],
    arguments: list[str] | None = None,
) -> int:
    """Measure, print the table, and write every figure with what it was measured on; returns the exit code."""
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or options.usual_repeats[options.quick]
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    console, load, began = Console(), machine.BackgroundLoad(), time.monotonic()
    if load.busy_at_start:
        console.warn(f"the machine is busy (load average {load.load_average:.2f}); do not take the figures seriously.")
    if options.quick:
        console.warn("this run only shows that the benchmark works; do not take its figures seriously.")
    try:
        values, figures = measure(options, console.info)
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
    rows = [(figure.part, figure.name, figure.shown()) for figure in figures]
    print_table("", ["part", "figure", "value"], rows)
    if others is not None and others > machine.BUSY_CORES:
        console.warn(f"other processes kept {others:.1f} cores busy; do not take the figures seriously.")
    written = {
        "command": machine.command_line(),
        "cores_used_by_others": others,
        **machine.describe(getattr(options, "device", "cpu")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "repeats": options.repeats,
        "backbone": options.backbone,
        "seconds": round(seconds, 1),
        "load_average_at_start": load.load_average,
        **values,
        "summary": [figure.to_dict() for figure in figures],
    }
    write_text(options.json, json.dumps(written, indent=1) + "\n")
    console.info(f"{len(figures)} figures in {format_seconds(seconds)}; {options.json}")
    return 0
