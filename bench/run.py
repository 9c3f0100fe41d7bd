"""Measure speed and memory: a training step against its peers', its share of the machine's speed, a prefix's cost.

    python -m bench.run                          # all parts, about half an hour on two cores
    python -m bench.run --parts train --repeats 3
    python -m bench.run --parts seq2seq --adapters-python .venv-adapters/bin/python
    python -m bench.run --parts train --prefix-length 500 --json bench/results/train_long_prefix.json
    python -m bench.run --parts train --joined 34 --json bench/results/train_long_texts.json   # of 2,000 tokens
    python -m bench.run --quick                  # only to see that it works

Sides take turns on the same data and never work at once, and a ratio is the median of the paired ratios. Prints a table
with goals, and writes every figure with the machine, the versions and the command. Needs `prefixtune prepare` once, and
PEFT for `train` and `seq2seq`; adapters pins another transformers, so it runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import data
from bench.results import FOLDER, DifferenceError, Figure, PeerError, Results, run_benchmark
from bench.serving import generate
from bench.training import decoder, encoder_decoder, flops
from prefixtune.backbone.load import DEFAULT_BACKBONE
from prefixtune.errors import PrefixError
from prefixtune.utils.console import Console

PARTS = ("train", "seq2seq", "flops", "generate")
PREFIX_LENGTH = 10
SEED = 0

SETTINGS = [(16, 4), (32, 8)]
"""(pairs per step, most targets of one source): the defaults of training, and what E2E's 8.6 targets allow."""
QUICK_SETTINGS = [(4, 2), (6, 3)]
JOINED_SETTINGS = [(2, 1)]
NUM_TEXTS, NEW_TOKENS = 16, 64
QUICK_NUM_TEXTS, QUICK_NEW_TOKENS = 4, 8


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"comma-separated: {','.join(PARTS)}")
    parser.add_argument("--repeats", type=_positive, help="timed rounds; a further one warms up (default 7; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument(
        "--data", type=Path, help="E2E training file (default: beside the repository, else the toy set)"
    )
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--prefix-length", type=_positive, default=PREFIX_LENGTH, help="default %(default)s")
    parser.add_argument("--joined", type=_positive, help="write N pairs as one long one, two of which are a step")
    parser.add_argument(
        "--adapters-python",
        type=Path,
        help="the Python of an environment with adapters 1.3.0, for `seq2seq` (default: that side is not measured)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=FOLDER / "latest.json",
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> int:
    """Measure; the exit code is 1 where a part failed."""
    options = parse()
    failed: list[str] = []
    code = run_benchmark(options, lambda console: measure(options, console, failed))
    return code or int(bool(failed))


def measure(options: argparse.Namespace, console: Console, failed: list[str]) -> Results:
    """Run the chosen parts; names of those that failed go to `failed`."""
    examples = data.read(options.data)
    console.info(f"data: {examples.name}, {examples.num_targets:,} pairs of {len(examples.examples):,} sources")
    if options.data is None and not examples.name.startswith("E2E"):
        console.warn("E2E was not found: measured on the toy set, whose goals are not E2E's. Name it with --data.")
    settings = QUICK_SETTINGS if options.quick else SETTINGS
    if options.joined is not None:
        examples, settings = data.join(examples, options.joined), JOINED_SETTINGS
    common: dict[str, Any] = {
        "backbone_name": options.backbone,
        "repeats": options.repeats,
        "prefix_length": options.prefix_length,
        "seed": SEED,
        "log": console.info,
    }
    values: dict[str, Any] = {"data": examples.describe()}
    figures: list[Figure] = []
    measures: dict[str, Callable[[], Results]] = {
        "train": lambda: decoder.run(examples, settings=settings, **common),
        "seq2seq": lambda: encoder_decoder.run(
            examples, settings=settings, quick=options.quick, adapters_python=options.adapters_python, **common
        ),
        "flops": lambda: flops.run(examples, setting=settings[0], quick=options.quick, **common),
        "generate": lambda: generate.run(
            examples,
            num_texts=QUICK_NUM_TEXTS if options.quick else NUM_TEXTS,
            new_tokens=QUICK_NEW_TOKENS if options.quick else NEW_TOKENS,
            **common,
        ),
    }
    for part in options.parts:
        try:
            values[part], more = measures[part]()
        except (PrefixError, DifferenceError, PeerError):
            raise
        except Exception as error:
            # What was measured before, perhaps in half an hour, is not lost.
            traceback.print_exc()
            failed.append(part)
            more = [Figure(part, "everything", None, reason=f"{type(error).__name__}: {error}")]
        figures += more
    return values, figures


if __name__ == "__main__":
    sys.exit(main())
