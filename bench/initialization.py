"""Compare starts and reparameterizations: train each on E2E with few and with more examples, and print a table.

    python -m bench.initialization --data ../shared/data/e2e --json bench/results/initialization.json

Every cell is one run (one seed): the same backbone, data, order and number of steps; development loss per token and
BLEU (greedy) on the same sampled development items. It takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import prefixtune as pt
from prefixtune.data import read_task
from prefixtune.inference.config import GenerateConfig
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

SIZES = {100: 80, 2000: 100}
"""Training targets -> optimizer steps (of 16 targets)."""

RATES = {"none": 5e-3, "residual": 2e-3, "mlp": 5e-4}
"""Reparameterization -> peak learning rate."""

RUNS = (("none", "words"), ("residual", "words"), ("mlp", "words"), ("none", "random"), ("mlp", "random"))


def main() -> None:
    """Run all cells; finished ones are kept if it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/e2e", help="folder with train and dev .jsonl.gz")
    parser.add_argument("--sizes", default="100,2000", help="training targets, of 100 and 2000")
    parser.add_argument("--runs", default=",".join(f"{a}/{b}" for a, b in RUNS), help="reparameterization/start, ...")
    parser.add_argument("--json", default="bench/results/initialization.json")
    options = parser.parse_args()
    console = Console()
    train = read_task("e2e", Path(options.data) / "train.jsonl.gz")
    random.Random(0).shuffle(train)
    dev = random.Random(1).sample(read_task("e2e", Path(options.data) / "dev.jsonl.gz"), 100)
    backbone = pt.load_backbone(dtype="auto")
    rows = []
    for size in (int(text) for text in options.sizes.split(",")):
        for run in options.runs.split(","):
            kind, start = run.split("/")
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                config = pt.TrainConfig(
                    task="e2e",
                    output=folder,
                    limit=size,
                    max_steps=SIZES[size],
                    eval_every=0,
                    reparameterization=kind,
                    initialization=start,
                    learning_rate=RATES[kind],
                )
                result = pt.train(config, backbone=backbone, examples=train, dev_examples=dev)
                trained = time.perf_counter() - began
                decoding = GenerateConfig(max_new_tokens=80, batch_size=50)
                score = pt.evaluate(backbone, dev, result.prefix, config=decoding, protocol="e2e").scores["bleu"]
            losses = [event["loss_per_token"] for event in result.events if event["event"] == "step"]
            rows.append(
                {
                    "targets": size,
                    "steps": config.max_steps,
                    "reparameterization": kind,
                    "start": start,
                    "learning_rate": config.peak_learning_rate,
                    "train_loss_of_last_20_steps": round(sum(losses[-20:]) / 20, 4),
                    "dev_loss": round(result.best_loss, 4),
                    "dev_bleu": round(score.score, 2),
                    "train_seconds": round(trained),
                    "initialization": result.events[0]["initialization"],
                }
            )
            console.info(json.dumps(rows[-1]))
            write_text(Path(options.json), json.dumps(rows, indent=1) + "\n")
    names = [key for key in rows[0] if key != "initialization"]
    console.table("initialization", names, [[str(row[name]) for name in names] for row in rows], result=True)


if __name__ == "__main__":
    main()
