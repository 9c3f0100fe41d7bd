"""Measure how long `prefixtune generate hello` takes to its first token, in fresh processes and by stages.

    python -m bench.start
    python -m bench.start --before OTHER_CHECKOUT/src      # in turn with another checkout

A stage ends when the command says so itself, in the lines of stderr or in the text of stdout. Bytecode is kept, as
where Python is installed as usual (`--no-bytecode` where it is not).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import ROOT, Figure, Log, PeerError, Results, make_parser, run_benchmark

STAGES = ("command line and torch", "transformers, weights and checks", "prompt and first token", "end")


def start(source: Path, backbone: str, bytecode: str) -> dict[str, float]:
    """Run the command once; seconds of every stage, until the first token, and of CPU time.

    Args:
        source: The folder that `prefixtune` is imported from.
        backbone: Name, hub id or folder.
        bytecode: Where Python keeps it; empty: nowhere.

    Raises:
        PeerError: The command fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "" if bytecode else "1"}
    if bytecode:
        environment["PYTHONPYCACHEPREFIX"] = bytecode
    command = [sys.executable, "-m", "prefixtune.cli.main", "generate", "hello", "--backbone", backbone, "--stream"]
    used, marks = _cpu_seconds(), [time.perf_counter()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen([*command, "--max-new-tokens", "8"], env=environment, **pipes) as process:
        for mark in (b"loading ", b"Backbone("):
            line = next((line for line in process.stderr or () if line.startswith(mark)), None)
            if line is None:
                raise PeerError(f"{source}: `generate` never wrote {mark.decode()!r}")
            marks.append(time.perf_counter())
        assert process.stdout is not None
        process.stdout.read(1)
        marks.append(time.perf_counter())
        process.communicate()
    if process.returncode:
        raise PeerError(f"{source}: `generate` ended with {process.returncode}")
    marks.append(time.perf_counter())
    stages = {stage: after - before for stage, before, after in zip(STAGES, marks, marks[1:], strict=False)}
    return {**stages, "first token": marks[-2] - marks[0], "CPU": _cpu_seconds() - used}


def _cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(options: argparse.Namespace, log: Log) -> Results:
    """The medians of all sides, which take turns; a first round warms the disk and makes the bytecode."""
    sides = {"now": ROOT / "src", **({"before": options.before} if options.before else {})}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats + 1):
            for side, source in sides.items():
                found = start(source, options.backbone, "" if options.no_bytecode else folder)
                if number:
                    runs[side].append(found)
                log(f"  {number}/{options.repeats} {side}: {found['first token']:.2f} s")
    figures = [
        Figure("start", f"{side}, {stage}", median(run[stage] for run in runs[side]), "s")
        for side in sides
        for stage in (*STAGES, "first token", "CPU")
    ]
    return {"bytecode": not options.no_bytecode, "runs": runs}, figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "start", repeats=5)
    parser.add_argument(
        "--before", type=Path, metavar="SRC", help="the src folder of another checkout, to compare with"
    )
    parser.add_argument("--no-bytecode", action="store_true", help="compile every module again in every process")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
