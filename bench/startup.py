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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.results import FOLDER, Figure, Log, PeerError, Results, run_benchmark
from prefixtune.backbone.load import DEFAULT_BACKBONE

ROOT = Path(__file__).resolve().parents[1]
HELLO = "generate, embedded backbone, first token"
SERVE = "serve, until ready"
SECONDS_TO_FIRST_TOKEN, SECONDS_TO_MISTAKE = 3.0, 1.0
LONGEST = 120.0
"""Seconds that a command may take."""
_THIS, _BEFORE = "this version", "before"
_MISTAKES = ("a mistaken option", "a missing file")


@dataclass
class Timing:
    """Seconds of one command, one value a run.

    Attributes:
        wall: From the shell to its end, or to what is waited for.
        cpu: Of the processor, until it ended.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


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
    """A model of two layers with the embedded one's tokenizer, ten rows, and a prefix in a folder of its own.

    Raises:
        PeerError: The training of the prefix fails.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefixtune.backbone.checkpoint import find_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(find_checkpoint(DEFAULT_BACKBONE)[0])
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**tokens, **sizes, **heads)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"source": f"the pub number {number}", "target": f"a pub, {number}"} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = ["train", "--train", str(folder / "rows.jsonl"), "--backbone", str(folder / "model"), "--max-steps", "1"]
    _run(ROOT, [*train, "--output", str(folder / "run")], folder)
    (folder / "prefixes").mkdir()
    (folder / "prefixes" / "p.safetensors").write_bytes((folder / "run" / "prefix.safetensors").read_bytes())


def time_command(checkout: Path, name: str, words: Sequence[str], folder: Path, timing: Timing) -> None:
    """Run a command once, and add its seconds.

    Raises:
        PeerError: It fails, or takes too long.
    """
    for old in (folder / "new").glob("*"):
        old.unlink()
    before, began = _cpu_of_children(), time.perf_counter()
    if name == SERVE:
        wall = _time_server(checkout, words, folder, began)
    else:
        wall = _run(checkout, words, folder, code=2 if name in _MISTAKES else 0, first=name == HELLO)
    timing.wall.append(wall)
    timing.cpu.append(_cpu_of_children() - before)


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


def _run(checkout: Path, words: Sequence[str], folder: Path, *, code: int = 0, first: bool = False) -> float:
    """Seconds until a command ends, or until the first byte of its output."""
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


def _time_server(checkout: Path, words: Sequence[str], folder: Path, began: float) -> float:
    """Seconds until a server answers that it is ready; it is stopped then."""
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
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name:
        folder = Path(name)
        make_files(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        chosen = {
            name: words
            for name, words in commands(folder, port).items()
            if not options.only or any(part in name for part in options.only.split(","))
        }
        timings = {side: {name: Timing() for name in chosen} for side in checkouts}
        for index in range(options.repeats + 1):
            for name, words in chosen.items():
                for side in checkouts if index % 2 else reversed(checkouts):
                    # The first round fills the system's cache of files.
                    timing = timings[side][name] if index else Timing()
                    time_command(checkouts[side], name, words, folder, timing)
            if index:
                log(f"  {index}/{options.repeats}: " + ", ".join(_progress(side, t) for side, t in timings.items()))
    values = {"seconds": {side: {name: vars(t) for name, t in these.items()} for side, these in timings.items()}}
    return values, _figures(timings)


def _progress(side: str, timings: dict[str, Timing]) -> str:
    return f"{side} {sum(timing.wall[-1] for timing in timings.values()):.1f} s"


def _figures(timings: dict[str, dict[str, Timing]]) -> list[Figure]:
    """The table's lines."""
    goals = {HELLO: SECONDS_TO_FIRST_TOKEN, **dict.fromkeys(_MISTAKES, SECONDS_TO_MISTAKE)}
    figures = []
    for name, this in timings[_THIS].items():
        figures.append(Figure(_THIS, name, median(this.wall), "s", at_most=goals.get(name)))
        figures.append(Figure(_THIS, f"{name}: processor", median(this.cpu), "s"))
    for name, other in timings.get(_BEFORE, {}).items():
        this = timings[_THIS][name]
        for clock, ours, theirs in (("time", this.wall, other.wall), ("processor time", this.cpu, other.cpu)):
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            figures.append(Figure("before / this", f"{name}: {clock}", median(ratios), "x"))
    return figures


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of another version")
    parser.add_argument("--only", default="", metavar="A,B", help="only the commands whose names hold one of these")
    parser.add_argument("--repeats", type=int, help="timed runs of each command (default 7; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="once, to see that it works; no figure counts")
    parser.add_argument("--json", type=Path, default=FOLDER / "startup.json", help="where the figures go")
    options = parser.parse_args()
    options.backbone = DEFAULT_BACKBONE
    options.repeats = options.repeats or (1 if options.quick else 7)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    if options.before is not None and not (options.before / "src" / "prefixtune" / "__init__.py").is_file():
        parser.error(f"--before {options.before}: there is no src/prefixtune in this folder")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


if __name__ == "__main__":
    sys.exit(main())
