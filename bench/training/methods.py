"""Measure a training step of each method of studies/methods.toml on the same batches: seconds and peak memory.

    python -m bench.training.methods --data e2e/       # about ten minutes on two quiet cores

Every method trains in a process of its own, with the settings of the study, in an order that is reversed every second
round. A figure is the median over all steps but each process's first two; memory counts from the first step.
docs/RESULTS.md shows the file that this writes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.results import FOLDER, write_results
from prefixtune.studies import StudyConfig, plan
from prefixtune.studies.cell import build_train_config

STUDY = Path(__file__).resolve().parents[2] / "studies" / "methods.toml"
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
stored = result.num_trained if result.prefix is None else result.prefix.num_parameters
measured = {"seconds": seconds, "peak_memory_mib": peak_memory_mib(), "trained": result.num_trained, "stored": stored}
print(json.dumps({**measured, "file_bytes": result.path.stat().st_size}))
"""


def settings(config: StudyConfig) -> dict[str, dict[str, Any]]:
    """The settings of a run of each method that trains, by the method's name."""
    found: dict[str, dict[str, Any]] = {}
    for cell in plan(config):
        if cell.trains and cell.method not in found:
            rate = config.rates(cell.method)[0]
            values = build_train_config(config, cell, rate, Path("unused"), cell.num_targets)
            found[cell.method] = values.to_dict()
    return found


def run_method(values: dict[str, Any], data: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Train some steps with a method, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"train": data, "limit": 400, "batch_size": batch_size, "max_steps": steps, "output": folder}
        values = {**values, **own, "warmup_steps": 0, "eval_every": 0, "patience": 0}
        done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(values)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{values['method']} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> int:
    """Print a table, and write the figures with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of E2E")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the study's; all by default")
    parser.add_argument("--json", type=Path, default=FOLDER / "methods.json", help="where the figures go")
    options = parser.parse_args()
    load, data = machine.BackgroundLoad(), str(Path(options.data).resolve())
    known = settings(StudyConfig.from_file(STUDY, data=data))
    methods = options.methods or list(known)
    if unknown := sorted(set(methods) - known.keys()):
        parser.error(f"{unknown[0]} is no method of the study that trains; there are {', '.join(known)}")
    runs_by_method: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for index in range(options.rounds):
        for method in methods[:: 1 if index % 2 == 0 else -1]:
            runs_by_method[method].append(run_method(known[method], data, options.steps, options.batch_size))
            print(f"round {index + 1}: {method}", file=sys.stderr)
    rows = {}
    for method, runs in runs_by_method.items():
        rows[method] = {
            "step_seconds": median(seconds for run in runs for seconds in run["seconds"][2:]),
            "rounds": [median(run["seconds"][2:]) for run in runs],
            "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
            **{name: runs[0][name] for name in ("trained", "stored", "file_bytes")},
        }
    first = rows[methods[0]]["step_seconds"]
    print("| method | trained | seconds a step | of the first's | peak memory, MiB |\n|---|---|---|---|---|")
    for method, row in rows.items():
        print(
            f"| {method} | {row['trained']:,} | {row['step_seconds']:.2f} | {row['step_seconds'] / first:.2f} "
            f"| {row['peak_memory_mib']:,.0f} |"
        )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_results(options.json, load, {"date": date, "batch_size": options.batch_size, "methods": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
