"""Measure training several prefixes at once against training them one after the other, on one backbone.

    python -m bench.training.together                 # about five minutes on two cores
    python -m bench.training.together --runs 2 --batch-sizes 4

Both sides take the same optimizer steps on the same batches, in turn in one process; the losses must agree. A ratio is
the median of the paired ratios, above 1 where training together is quicker.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import data
from bench.machine import BackgroundLoad
from bench.results import FOLDER, write_results
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, join
from prefixtune.data.encoding import TokenizedExample, default_format, encode_examples
from prefixtune.data.order import epoch_batches
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.words import from_words

LENGTHS = (5, 10, 10, 20)


def prepare(backbone: Backbone, encoded: Sequence[TokenizedExample], runs: int, batch_size: int) -> list[list[Batch]]:
    """Four batches for each run, in an order of its own."""
    plans = []
    for seed in range(runs):
        plan = epoch_batches(encoded, batch_size=batch_size, targets_per_source=4, seed=seed)
        plans.append([collate(backbone, batch) for batch in islice(plan, 4)])
    return plans


def train_separately(backbone: Backbone, prefixes: list[Prefix], batches: list[Batch]) -> float:
    """Losses and gradients of all runs, one after the other; the sum of the losses."""
    total = 0.0
    for prefix, batch in zip(prefixes, batches, strict=True):
        loss = batch_loss(backbone, prefix.leaves(), batch).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def train_together(backbone: Backbone, prefixes: list[Prefix], batches: list[Batch]) -> float:
    """The same in one pass."""
    loss = batch_loss(backbone, [prefix.leaves() for prefix in prefixes], join(batches)).sum()
    loss.backward()
    return float(loss.detach())


def measure(
    backbone: Backbone, encoded: Sequence[TokenizedExample], runs: int, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Seconds of both sides for a step of all runs, and the ratio."""
    prefixes = [
        from_words(backbone, "Describe the restaurant in one sentence:", LENGTHS[index % len(LENGTHS)])
        for index in range(runs)
    ]
    plans = prepare(backbone, encoded, runs, batch_size)
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for repeat in range(repeats + 1):
        batches = [plan[repeat % len(plan)] for plan in plans]
        losses = {}
        for name, side in (("alone", train_separately), ("together", train_together)):
            began = time.perf_counter()
            losses[name] = side(backbone, prefixes, batches)
            # The first round warms up.
            if repeat:
                seconds[name].append(time.perf_counter() - began)
        difference = abs(losses["together"] - losses["alone"]) / abs(losses["alone"])
        if difference > (1e-4 if backbone.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"the two sides differ by {difference:.1e}: {losses}")
    ratio = median(a / b for a, b in zip(seconds["alone"], seconds["together"], strict=True))
    return {
        "runs": runs,
        "batch_size": batch_size,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **{f"{name}_seconds": round(median(values), 3) for name, values in seconds.items()},
        "ratio": round(ratio, 3),
    }


def main() -> int:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=None, help="E2E's training file")
    parser.add_argument("--runs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=FOLDER / "together.json")
    options = parser.parse_args()
    load, examples, figures = BackgroundLoad(), data.read(options.data), []
    for dtype in options.dtypes:
        backbone = load_backbone(options.backbone, dtype=dtype)
        form = default_format(backbone)
        encoded = encode_examples(backbone, examples.examples[:400], form, prefix_length=max(LENGTHS)).examples
        for batch_size in options.batch_sizes:
            for runs in options.runs:
                figures.append(measure(backbone, encoded, runs, batch_size, options.repeats))
                print(json.dumps(figures[-1]), flush=True)
    write_results(options.json, load, {"data": examples.name, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
