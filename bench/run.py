"""Measure a training step against PEFT's, in time and in memory.

    python -m bench.run                          # about a quarter of an hour on two cores
    python -m bench.run --prefix-length 500 --json bench/results/train_long_prefix.json
    python -m bench.run --quick                  # only to see that it works

Sides take turns on the same data and never work at once, and a ratio is the median of the paired ratios. Prints a table
with goals, and writes every figure with the machine, the versions and the command. Needs `prefixtune prepare` once, and
PEFT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import data
from bench.results import FOLDER, Results, run_benchmark
from bench.training import decoder
from prefixtune.backbone.load import DEFAULT_BACKBONE
from prefixtune.utils.console import Console

PREFIX_LENGTH = 10
SEED = 0

SETTINGS = [(16, 4), (32, 8)]
"""(pairs per step, most targets of one source): the defaults of training, and what E2E's 8.6 targets allow."""
QUICK_SETTINGS = [(4, 2), (6, 3)]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 7; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument(
        "--data", type=Path, help="E2E training file (default: beside the repository, else the toy set)"
    )
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--prefix-length", type=int, default=PREFIX_LENGTH, help="default %(default)s")
    parser.add_argument("--json", type=Path, default=FOLDER / "train.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 7)
    return options


def measure(options: argparse.Namespace, console: Console) -> Results:
    """All figures."""
    examples = data.read(options.data)
    if options.data is None and not examples.name.startswith("E2E"):
        console.warn("E2E was not found: measured on the toy set, whose goals are not E2E's. Name it with --data.")
    values, figures = decoder.run(
        examples,
        settings=QUICK_SETTINGS if options.quick else SETTINGS,
        backbone_name=options.backbone,
        repeats=options.repeats,
        prefix_length=options.prefix_length,
        seed=SEED,
        log=console.info,
    )
    return {"data": examples.describe(), "train": values}, figures


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console))


if __name__ == "__main__":
    sys.exit(main())
