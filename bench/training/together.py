"""Measure training several prefixes at once against one after the other, on one backbone.

    python bench/together.py                 # about five minutes on two cores
    python bench/together.py --runs 2 --batch-sizes 4

Both sides take the same optimizer steps on the same batches, in turn in one process; the losses must agree. A ratio is
the median of the paired ratios, above 1 where training together is quicker.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import data
import machine
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, epoch_batches, join
from prefixtune.data.encoding import TokenizedExample, default_format, encode_examples
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.initialize import from_words

LENGTHS = (5, 10, 10, 20)


def prepare(backbone: Backbone, encoded: tuple[TokenizedExample, ...], runs: int, batch_size: int) -> list[list[Batch]]:
    """A few batches for each run, in another order each."""
    plans = []
    for seed in range(runs):
        plan = epoch_batches(encoded, batch_size=batch_size, targets_per_source=4, seed=seed)
        plans.append([collate(backbone, hands) for hands, _ in zip(plan, range(4), strict=False)])
    return plans


def alone(backbone: Backbone, prefixes: list[Prefix], batches: list[Batch]) -> float:
    """Losses and gradients of all runs, one after the other; the sum of the losses."""
    total = 0.0
    for prefix, batch in zip(prefixes, batches, strict=True):
        loss = batch_loss(backbone, prefix.leaves(), batch).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def together(backbone: Backbone, prefixes: list[Prefix], batches: list[Batch]) -> float:
    """The same in one pass."""
    loss = batch_loss(backbone, [prefix.leaves() for prefix in prefixes], join(batches)).sum()
    loss.backward()
    return float(loss.detach())


def measure(backbone: Backbone, encoded: tuple[TokenizedExample, ...], runs: int, batch_size: int, repeats: int) -> Any:
    """Seconds of both sides for a step of all runs, and the ratio."""
    prefixes = [
        from_words(backbone, "Describe the restaurant in one sentence:", LENGTHS[number % len(LENGTHS)])
        for number in range(runs)
    ]
    plans = prepare(backbone, encoded, runs, batch_size)
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for repeat in range(repeats + 1):
        batches = [plan[repeat % len(plan)] for plan in plans]
        found = {}
        for name, side in (("alone", alone), ("together", together)):
            began = time.perf_counter()
            found[name] = side(backbone, prefixes, batches)
            # The first round warms up.
            if repeat:
                seconds[name].append(time.perf_counter() - began)
        apart = abs(found["together"] - found["alone"]) / abs(found["alone"])
        if apart > (1e-4 if backbone.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"the two sides differ by {apart:.1e}: {found}")
    ratio = median(a / b for a, b in zip(seconds["alone"], seconds["together"], strict=True))
    return {
        "runs": runs,
        "batch_size": batch_size,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **{f"{name}_seconds": round(median(found), 3) for name, found in seconds.items()},
        "ratio": round(ratio, 3),
    }


def main() -> int:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=None, help="E2E's training file")
    parser.add_argument("--runs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "together.json")
    options = parser.parse_args()
    neighbours, read, found = machine.Neighbours(), data.read(options.data), []
    for dtype in options.dtypes:
        backbone = load_backbone(options.backbone, dtype=dtype)
        form = default_format(backbone)
        encoded = encode_examples(backbone, read.examples[:400], form, prefix_length=max(LENGTHS)).examples
        for batch_size in options.batch_sizes:
            for runs in options.runs:
                found.append(measure(backbone, encoded, runs, batch_size, options.repeats))
                print(json.dumps(found[-1]), flush=True)
    command = shlex.join(["python", *sys.argv])
    written = {"command": command, "data": read.name, "cores_used_by_others": neighbours.cores(), **machine.describe()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**written, "figures": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
