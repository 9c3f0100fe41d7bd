"""Measure what a training step of each method costs, on the same batches: seconds and peak memory.

    python bench/methods.py --data e2e/       # about six minutes on two quiet cores

Every method trains in a process of its own, as `prefixtune train` does, in an order that is reversed in every other
round. A figure is the median over all steps but each process's first two; memory counts from the first step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import machine

METHODS = ("prefix", "full", "top:2", "adapter:115", "adapter:3", "lora:8", "prompt")
CHILD = """
import json, sys
from prefixtune.training.config import TrainConfig
from prefixtune.utils.machine import reset_peak_memory, peak_memory_mib
from prefixtune.training.train import train
seconds = []
def told(event):
    if event["event"] == "start":
        reset_peak_memory()
    if event["event"] == "step":
        seconds.append(event["seconds"])
result = train(TrainConfig.from_mapping(json.loads(sys.argv[1])), on_event=told)
print(json.dumps({"seconds": seconds, "peak_memory_mib": peak_memory_mib(), "trained": result.num_trained}))
"""


def run(method: str, data: str, steps: int, batch_size: int) -> dict[str, Any]:
    """A few steps of a method in a process of its own."""
    base, _, size = method.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "task": "e2e",
            "train": data,
            "limit": 400,
            "method": base,
            **({"method_size": int(size)} if size else {}),
            "batch_size": batch_size,
            "max_steps": steps,
            "warmup_steps": 0,
            "eval_every": 0,
            "output": folder,
        }
        done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(values)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of E2E")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    options = parser.parse_args()
    data = str(Path(options.data).resolve())
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    for number in range(options.rounds):
        for method in options.methods[:: 1 if number % 2 == 0 else -1]:
            found[method].append(run(method, data, options.steps, options.batch_size))
            print(f"round {number + 1}: {method}", file=sys.stderr)
    rows = {}
    for method, runs in found.items():
        medians = [median(each["seconds"][2:]) for each in runs]
        rows[method] = {
            "step_seconds": median(second for each in runs for second in each["seconds"][2:]),
            "rounds": medians,
            "peak_memory_mib": max(each["peak_memory_mib"] for each in runs),
            "trained": runs[0]["trained"],
        }
    first = rows[options.methods[0]]["step_seconds"]
    print("| method | trained | seconds a step | of the first's | peak memory, MiB |\n|---|---|---|---|---|")
    for method, row in rows.items():
        print(
            f"| {method} | {row['trained']:,} | {row['step_seconds']:.2f} | {row['step_seconds'] / first:.2f} "
            f"| {row['peak_memory_mib']:,.0f} |"
        )
    print(json.dumps({"command": shlex.join(sys.argv), "methods": rows, **machine.describe()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
