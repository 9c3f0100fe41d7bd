"""Measure a training step against PEFT's, in time and in memory.

    python -m bench.train                          # about a quarter of an hour on two cores
    python -m bench.train --prefix-length 500 --json bench/results/train_long_prefix.json
    python -m bench.train --quick                  # only to see that it works

Sides take turns on the same data and never work at once, and a ratio is the median of the paired ratios. Writes every
figure with the machine, the versions and the command. Needs `prefixtune prepare` once, and PEFT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import data
from bench.data import Batch
from bench.models import make_backbone
from bench.results import Figure, Log, Results, make_parser, run_benchmark
from bench.train_sides import (
    VARIANTS,
    Side,
    compare,
    make_side,
    measure_peak,
    num_target_tokens,
    require_equal,
    set_weights,
    timed_step,
)
from bench.turns import isolated, ratio_figures, speed_ratios, take_turns

SETTINGS = [(16, 4), (32, 8)]
"""(pairs per step, most targets of one source): the defaults of training, and what E2E's 8.6 targets allow."""
QUICK_SETTINGS = [(4, 2), (6, 3)]
MEMORY_STEPS = 4
PAIRS = (("ours-fp32", "peft-fp32"), ("ours-bf16", "peft-fp32"), ("ours-bf16", "peft-bf16"))
NAMES = {
    name: f"{library} {dtype.replace('float', 'fp').replace('bfp', 'bf')}"
    for name, (library, dtype) in VARIANTS.items()
}


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All figures."""
    name, examples = data.read(options.data)
    backbone = make_backbone(options.backbone, "float32", "cpu")
    length, number = options.prefix_length, max(options.repeats + 1, MEMORY_STEPS)
    batches = {
        setting: data.make_batches(backbone, examples, setting, number=number, prefix_length=length)
        for setting in (QUICK_SETTINGS if options.quick else SETTINGS)
    }
    del backbone
    memory = {
        setting: {
            variant: isolated(
                memory_of, variant, some[:MEMORY_STEPS], options.backbone, length, torch.get_num_threads()
            )
            for variant in VARIANTS
        }
        for setting, some in batches.items()
    }
    sides = {variant: make_side(variant, length, options.backbone) for variant in VARIANTS}
    start = [weight.detach().clone() for weight in sides["peft-fp32"].weights()]
    results: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for setting, some in batches.items():
        log(f"training step: {setting[0]} pairs, up to {setting[1]} targets of a source")
        results.append(
            {**measure_setting(sides, setting, some, start, options.repeats, log), "memory": memory[setting]}
        )
        figures += report(results[-1])
    trained = sum(weight.numel() for weight in start)
    facts = {"prefix_length": length, "trained_parameters": trained}
    return {"data": name, "train": {**facts, "settings": results}}, figures


def memory_of(
    variant: str, batches: Sequence[Batch], backbone: str, prefix_length: int, threads: int
) -> dict[str, Any]:
    """The memory of one side's steps; in a process of its own."""
    torch.set_num_threads(threads)
    return measure_peak(make_side(variant, prefix_length, backbone), batches)


def measure_setting(
    sides: Mapping[str, Side],
    setting: tuple[int, int],
    batches: Sequence[Batch],
    start: Sequence[Tensor],
    repeats: int,
    log: Log,
) -> dict[str, Any]:
    """Differences between the sides, and their times.

    Every setting starts from the same weights: after some steps gradients can be small sums of large numbers.

    Raises:
        DifferenceError: In float32 they differ by more than rounding.
    """
    reference = sides["peft-fp32"]
    set_weights(reference, start)
    differences = require_equal(reference, sides["ours-fp32"], batches[0])
    rounding = {variant: compare(reference, sides[variant], batches[0]) for variant in ("peft-bf16", "ours-bf16")}
    for side in sides.values():
        set_weights(side, start)
    losses: dict[str, list[float]] = {variant: [] for variant in sides}

    def run(variant: str, index: int) -> float:
        seconds, loss = timed_step(sides[variant], batches[index])
        losses[variant].append(loss)
        return seconds

    seconds = take_turns(list(sides), repeats, run, log)
    tokens = [num_target_tokens(batch) for batch in batches[1 : repeats + 1]]
    return {
        "batch_size": setting[0],
        "targets_per_source": setting[1],
        "differences_in_float32": differences,
        "differences_of_bfloat16": rounding,
        "target_tokens": tokens,
        "seconds": seconds,
        "losses": losses,
        "tokens_per_second": {
            variant: median(n / s for n, s in zip(tokens, taken, strict=True)) for variant, taken in seconds.items()
        },
        "speed_ratios": speed_ratios(seconds, PAIRS),
    }


def report(result: Mapping[str, Any]) -> list[Figure]:
    """A setting's lines of the table."""
    title = f"{result['batch_size']} pairs, <= {result['targets_per_source']} per source: "
    figures = [Figure("train", f"{title}largest difference in fp32", max(result["differences_in_float32"].values()))]
    for variant, name in NAMES.items():
        figures.append(Figure("train", f"{title}{name}", result["tokens_per_second"][variant], "target tokens/s"))
    figures += ratio_figures("train", title, NAMES, result["speed_ratios"], PAIRS)
    memory = result["memory"]
    for variant, name in NAMES.items():
        figures.append(Figure("train", f"{title}{name}, peak memory", memory[variant]["peak_mib"], "MiB"))
        figures.append(Figure("train", f"{title}{name}, above the loaded model", memory[variant]["step_mib"], "MiB"))
    for one, other in PAIRS:
        ratio = memory[one]["peak_mib"] / memory[other]["peak_mib"]
        figures.append(Figure("train", f"{title}{NAMES[one]} / {NAMES[other]}, peak memory", ratio, "x"))
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "train", repeats=7, quick=2)
    parser.add_argument("--data", type=Path, help="E2E's training file (default: beside the repository, or toy)")
    parser.add_argument("--prefix-length", type=int, default=10, help="default %(default)s")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
