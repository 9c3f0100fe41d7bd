"""Measure what every command costs before it works: seconds from the shell, and of the processor.

    python -m bench.startup                      # this version alone, on a model of two layers and on the embedded one
    python -m bench.startup --before OTHER       # and the checkout in the folder OTHER, in turn in the same run

All files are in the system's cache: each command runs once before it is timed. `serve` is timed until it is ready, and
`generate` on the embedded backbone until its first token is on stdout. Processor time is of the command and of the
processes that it waited for; it is steadier than time where other programs run. A ratio is the median of the paired
ratios, before / this version: 2 is twice as fast.

Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.models import save_model
from bench.results import ROOT, Figure, Log, PeerError, Results, make_parser, run_benchmark
from bench.serve_side import free_port
from bench.turns import take_turns

HELLO = "generate, embedded backbone, first token"
SERVE = "serve, until ready"
LONGEST = 120.0
"""Seconds that a command may take."""
_THIS, _BEFORE = "this version", "before"
_MISTAKES = ("a mistaken option", "a missing file")


def commands(folder: Path, port: int) -> dict[str, list[str]]:
    """What is timed: its name -> the command."""
    model, prefix, rows = str(folder / "model"), str(folder / "run" / "prefix.safetensors"), str(folder / "rows.jsonl")
    tiny = ["--quiet", "--backbone", model]
    return {
        HELLO: ["generate", "--stream", "--quiet", "--max-new-tokens", "1", "hello"],
        "--version": ["--version"],
        "--help": ["--help"],
        _MISTAKES[0]: ["generate", "--max-tokenz", "1", "hello"],
        _MISTAKES[1]: ["generate", "--prefix", str(folder / "missing.safetensors"), "hello"],
        "inspect": ["inspect", prefix],
        "data": ["data", rows, "--backbone", model],
        "train, one step": ["train", "--train", rows, "--output", str(folder / "new"), "--max-steps", "1", *tiny],
        "generate": ["generate", "--prefix", prefix, "--max-new-tokens", "1", *tiny, "hello"],
        "chat": ["chat", "--prefix", prefix, "--max-new-tokens", "1", *tiny],
        "evaluate": ["evaluate", "--prefix", prefix, "--data", rows, "--max-new-tokens", "1", *tiny],
        SERVE: ["serve", "--backbone", model, "--prefixes", str(folder / "prefixes"), "--port", str(port)],
    }


def make_files(folder: Path) -> None:
    """A model of two layers, ten rows, and a prefix in a folder of its own.

    Raises:
        PeerError: The training of the prefix fails.
    """
    save_model("tiny", folder / "model")
    rows = [{"source": f"the pub number {number}", "target": f"a pub, {number}"} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = ["train", "--train", str(folder / "rows.jsonl"), "--backbone", str(folder / "model"), "--max-steps", "1"]
    run_command(ROOT, [*train, "--output", str(folder / "run")], folder)
    (folder / "prefixes").mkdir()
    (folder / "prefixes" / "p.safetensors").write_bytes((folder / "run" / "prefix.safetensors").read_bytes())


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _start(checkout: Path, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "prefixtune", *words],
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log.open("wb"),
    )


def run_command(checkout: Path, words: Sequence[str], folder: Path, *, code: int = 0, first: bool = False) -> float:
    """Seconds until a command ends with this code, or until the first byte of its output.

    Raises:
        PeerError: It fails, or takes too long.
    """
    log, began = folder / "stderr.txt", time.perf_counter()
    process = _start(checkout, words, log)
    assert process.stdout is not None
    start = process.stdout.read(1) if first else b""
    seconds = time.perf_counter() - began
    try:
        process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode != code or (first and not start):
        raise PeerError(f"`{' '.join(words)}` ended with {process.returncode}: {log.read_text()[-300:]}")
    return seconds if first else time.perf_counter() - began


def time_server(checkout: Path, words: Sequence[str], folder: Path) -> float:
    """Seconds until a server answers that it is ready; it is stopped then.

    Raises:
        PeerError: It is not.
    """
    began = time.perf_counter()
    log, port = folder / "stderr.txt", int(words[-1])
    process = _start(checkout, words, log)
    try:
        while time.perf_counter() < began + LONGEST and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if b" 200 " in connection.recv(100)[:16]:
                    return time.perf_counter() - began
            time.sleep(0.02)
        raise PeerError(f"`{' '.join(words)}` was not ready: {log.read_text()[-300:]}")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All commands, of all versions in turn."""
    checkouts = {_THIS: ROOT, **({} if options.before is None else {_BEFORE: options.before.resolve()})}
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as made:
        folder = Path(made)
        make_files(folder)
        chosen = {
            name: words
            for name, words in commands(folder, free_port()).items()
            if not options.only or any(part in name for part in options.only.split(","))
        }
        runs = [f"{side}: {name}" for name in chosen for side in checkouts]
        cpu: dict[str, list[float]] = {run: [] for run in runs}

        def run(which: str, index: int) -> float:
            side, _, name = which.partition(": ")
            for old in (folder / "new").glob("*"):
                old.unlink()
            before = _cpu_of_children()
            if name == SERVE:
                wall = time_server(checkouts[side], chosen[name], folder)
            else:
                code = 2 if name in _MISTAKES else 0
                wall = run_command(checkouts[side], chosen[name], folder, code=code, first=name == HELLO)
            if index:
                cpu[which].append(_cpu_of_children() - before)
            return wall

        # The first round fills the system's cache of files.
        wall = take_turns(runs, options.repeats, run, log)
    figures = []
    for clock, seconds in (("time", wall), ("processor time", cpu)):
        for which, taken in seconds.items():
            figures.append(Figure("startup", f"{which}, {clock}", median(taken), "s"))
        for name in chosen if _BEFORE in checkouts else ():
            pairs = zip(seconds[f"{_THIS}: {name}"], seconds[f"{_BEFORE}: {name}"], strict=True)
            ratio = median(before / this for this, before in pairs)
            figures.append(Figure("startup", f"before / this: {name}, {clock}", ratio, "x"))
    return {"seconds": wall, "processor_seconds": cpu}, figures


def main() -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "startup", repeats=7)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of another version")
    parser.add_argument("--only", default="", metavar="A,B", help="only the commands whose names hold one of these")
    return run_benchmark(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
