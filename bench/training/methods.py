"""Measure a training step of each method on the same batches: seconds and peak memory.

    python -m bench.training.methods --data e2e/       # about six minutes on two quiet cores

Every method trains in a process of its own, as `prefixtune train` does, in an order that is reversed every second
round. A figure is the median over all steps but each process's first two; memory counts from the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine

METHODS = ("prefix", "full", "top:2", "adapter:115", "adapter:3", "lora:8", "prompt")
CHILD = """
import json, sys
from prefixtune.training.config import TrainConfig
from prefixtune.utils.machine import reset_peak_memory, peak_memory_mib
from prefixtune.training.train import train
seconds = []
def on_event(event):
    if event["event"] == "start":
        reset_peak_memory()
    if event["event"] == "step":
        seconds.append(event["seconds"])
result = train(TrainConfig(**json.loads(sys.argv[1])), on_event=on_event)
print(json.dumps({"seconds": seconds, "peak_memory_mib": peak_memory_mib(), "trained": result.num_trained}))
"""


def run_method(method: str, data: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Train some steps with a method, in a process of its own."""
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
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


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
    runs_by_method: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    for index in range(options.rounds):
        for method in options.methods[:: 1 if index % 2 == 0 else -1]:
            runs_by_method[method].append(run_method(method, data, options.steps, options.batch_size))
            print(f"round {index + 1}: {method}", file=sys.stderr)
    rows = {}
    for method, runs in runs_by_method.items():
        rows[method] = {
            "step_seconds": median(seconds for run in runs for seconds in run["seconds"][2:]),
            "rounds": [median(run["seconds"][2:]) for run in runs],
            "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
            "trained": runs[0]["trained"],
        }
    first = rows[options.methods[0]]["step_seconds"]
    print("| method | trained | seconds a step | of the first's | peak memory, MiB |\n|---|---|---|---|---|")
    for method, row in rows.items():
        print(
            f"| {method} | {row['trained']:,} | {row['step_seconds']:.2f} | {row['step_seconds'] / first:.2f} "
            f"| {row['peak_memory_mib']:,.0f} |"
        )
    print(json.dumps({"command": machine.command_line(), "methods": rows, **machine.describe()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
