"""Measure speed and memory: a training step against its peers', its share of the machine's speed, a prefix's cost.

    python bench/run.py                          # all parts, about half an hour on two cores
    python bench/run.py --parts train --repeats 3
    python bench/run.py --parts seq2seq --adapters-python .venv-adapters/bin/python
    python bench/run.py --quick                  # only to see that it works

Sides take turns on the same data and never work at once, and a ratio is the median of the paired ratios. Prints a table
with goals, and writes every figure with the machine, the versions and the command. Needs `prefixtune prepare` once, and
PEFT for `train` and `seq2seq`; adapters pins another transformers, so it runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import flops_part
import generate_part
import machine
import seq2seq_part
import train_part
from adapters_peer import PeerError
from results import Line
from sides import DifferenceError

from prefixtune.backbone.load import DEFAULT_BACKBONE
from prefixtune.errors import PrefixError
from prefixtune.utils.console import Console, format_seconds

PARTS = ("train", "seq2seq", "flops", "generate")
PREFIX_LENGTH = 10
SEED = 0

# (pairs per step, most targets of one source): the defaults of training, and what E2E's 8.6 targets per source allow.
SETTINGS = [(16, 4), (32, 8)]
QUICK_SETTINGS = [(4, 2), (6, 3)]
TEXTS, NEW_TOKENS = 16, 64
QUICK_TEXTS, QUICK_NEW_TOKENS = 4, 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"comma-separated: {','.join(PARTS)}")
    parser.add_argument("--repeats", type=_positive, help="timed rounds; a further one warms up (default 7; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument(
        "--data", type=Path, help="E2E training file (default: beside the repository, else the toy set)"
    )
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument(
        "--adapters-python",
        type=Path,
        help="the Python of an environment with adapters 1.3.0, for `seq2seq` (default: that side is not measured)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).resolve().parent / "results" / "latest.json",
        help="where the figures go (default bench/results/latest.json)",
    )
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 7)
    return options


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main() -> int:
    options, console = parse(), Console()
    neighbours = machine.Neighbours()
    if neighbours.busy_at_start:
        console.warn(f"the machine is busy (load average {neighbours.load:.2f}); do not take the figures seriously.")
    if options.quick:
        console.warn("--quick only shows that the benchmark works; do not take its figures seriously.")
    began = time.monotonic()
    try:
        found, lines = measure(options, console)
    except PrefixError as error:
        console.error(error.message, error.hint)
        return 2
    except DifferenceError as error:
        console.error(str(error), "a comparison of speed would mean nothing; nothing was written.")
        return 1
    except PeerError as error:
        console.error(f"a peer stopped: {error}", "leave it out, or its part; nothing was written.")
        return 1
    conclude(options, console, neighbours, began, found, lines)
    return 1 if any(line.value is None and line.what == "everything" for line in lines) else 0


def conclude(
    options: argparse.Namespace,
    console: Console,
    neighbours: machine.Neighbours,
    began: float,
    found: dict[str, Any],
    lines: list[Line],
) -> None:
    """Show the table, and write every figure with what it was measured on; `bench/serve.py` ends so, too."""
    others = neighbours.cores()
    console.table("", ["part", "figure", "value", "goal", ""], [line.cells() for line in lines], result=True)
    if others is not None and others > machine.BUSY_CORES:
        console.warn(f"other processes kept {others:.1f} cores busy meanwhile; do not take the figures seriously.")
    written = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "repeats": options.repeats,
        "backbone": options.backbone,
        "seconds": round(time.monotonic() - began, 1),
        "load_average_at_start": neighbours.load,
        "cores_used_by_others": others,
        **machine.describe(),
        **found,
        "summary": [line.to_dict() for line in lines],
    }
    write(options.json, written)
    missed = sum(line.reached is False for line in lines)
    reached = sum(line.reached is True for line in lines)
    console.info(
        f"{reached} goals reached, {missed} missed, in {format_seconds(time.monotonic() - began)}; {options.json}"
    )


def measure(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Line]]:
    """Run the chosen parts; their figures, and the table's lines."""
    read = data.read(options.data)
    console.info(f"data: {read.name}, {read.num_targets:,} pairs of {len(read.examples):,} sources")
    if options.data is None and not read.name.startswith("E2E"):
        console.warn("E2E is not at hand: measured on the toy set, whose goals are not E2E's. Name it with --data.")
    settings = QUICK_SETTINGS if options.quick else SETTINGS
    common: dict[str, Any] = {
        "backbone_name": options.backbone,
        "repeats": options.repeats,
        "prefix_length": PREFIX_LENGTH,
        "seed": SEED,
        "say": console.info,
    }
    found: dict[str, Any] = {"data": read.describe()}
    lines: list[Line] = []
    measures: dict[str, Callable[[], tuple[dict[str, Any], list[Line]]]] = {
        "train": lambda: train_part.run(read, settings=settings, **common),
        "seq2seq": lambda: seq2seq_part.run(
            read, settings=settings, quick=options.quick, adapters_python=options.adapters_python, **common
        ),
        "flops": lambda: flops_part.run(read, setting=settings[0], quick=options.quick, **common),
        "generate": lambda: generate_part.run(
            read,
            num_texts=QUICK_TEXTS if options.quick else TEXTS,
            new_tokens=QUICK_NEW_TOKENS if options.quick else NEW_TOKENS,
            **common,
        ),
    }
    for part in options.parts:
        try:
            found[part], more = measures[part]()
        except (PrefixError, DifferenceError, PeerError):
            raise
        except Exception as error:
            # What was measured before, in half an hour perhaps, is not lost.
            traceback.print_exc()
            more = [Line(part, "everything", None, reason=f"{type(error).__name__}: {error}")]
        lines += more
    return found, lines


def write(path: Path, values: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
