"""AdamW against orthogonalized momentum (Muon) for a prefix's numbers, and LoRA: the development loss of short runs.

    python -m bench.training.optimizers --task webnlg --data ../shared/data/webnlg2017 --seeds 3

All arms of a seed train on the same targets in the same order and steps. An arm is an optimizer and its peak rate:
`adamw:0.02` and `muon:0.004` train a prefix of at most 106 positions from solved examples, `lora:0.0081` LoRA of rank
4, which stores as many numbers, with AdamW. A run of 32 steps takes two minutes on a core.
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import fmean
from typing import Any

import prefixtune as pt
from prefixtune.data import Example, read_task
from prefixtune.studies.data import sample_examples, sample_targets
from prefixtune.utils.console import Console

ARMS = ("adamw", "muon", "lora")


def dev_loss(arm: str, train: list[Example], dev: list[Example], settings: dict[str, Any]) -> float:
    """The development loss per token after a run of an arm, on a backbone of its own, since LoRA changes it."""
    backbone = pt.load_backbone(dtype="auto")
    name, _, rate = arm.partition(":")
    own: dict[str, Any] = {"prefix_length": 106, "initialization": "examples", "optimizer": name}
    if name == "lora":
        own = {"method": "lora", "method_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        own |= {"dtype": backbone.dtype_name, "learning_rate": float(rate), "output": folder}
        config = pt.TrainConfig(**settings, **own)
        result = pt.train(config, backbone=backbone, examples=train, dev_examples=dev)
    return float(result.best_loss)


def main() -> None:
    """Print a line for each run, and a table of the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="webnlg")
    parser.add_argument("--data", default="../shared/data/webnlg2017", help="the task's folder")
    parser.add_argument("--arms", nargs="+", default=["adamw:0.02", "muon:0.004", "lora:0.0081"], metavar="NAME:RATE")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    for arm in options.arms:
        if arm.partition(":")[0] not in ARMS:
            parser.error(f"{arm!r} is no arm: {', '.join(ARMS)}, each with its rate")
    console = Console()
    settings = {
        "task": options.task,
        "max_steps": options.steps,
        "batch_size": options.batch_size,
        "eval_every": options.steps,
        "warmup_steps": max(1, options.steps // 5),
    }
    train, dev = (read_task(options.task, options.data, split=split, needs_targets=True) for split in ("train", "dev"))
    dev = sample_examples(dev, 40, "dev")
    losses: dict[str, list[float]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        sample = sample_targets(train, options.steps * options.batch_size, "sources", str(seed))
        for arm, found in losses.items():
            found.append(dev_loss(arm, sample, dev, {**settings, "seed": seed}))
            console.info(f"seed {seed}, {arm}: {found[-1]:.4f}")
    rows = [[arm, f"{fmean(found):.4f}", " ".join(f"{loss:.4f}" for loss in found)] for arm, found in losses.items()]
    console.table("development loss per token", ["arm", "mean", "by seed"], rows, result=True)


if __name__ == "__main__":
    main()
