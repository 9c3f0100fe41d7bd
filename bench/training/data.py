"""Memory and seconds of a start with few and with a million examples: `prefixtune train` on files that are made here.

    python -m bench.training.data --rows 10000 1000000 --output RESULTS.json

The model is a LLaMA of two layers with random weights and SmolLM2's tokenizer, so that what is measured is the data.
Each file is trained on twice, a few steps each time: the first run reads and tokenizes it, the second finds it in the
cache. Memory is the process's peak: of all pages, and without those of mapped files, which the system drops when it
needs room (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import command_line, describe
from prefixtune.backbone.packaged import DEFAULT, pretrained_folder

WORDS = re.findall(
    r"\w+",
    "the a train station night board coach platform ticket late early arrives leaves from to north south harbour lake "
    "city hill market seat window door staff asks answers quickly because weather snow rain wind bridge river tunnel "
    "signal track repair delay minutes hours today tomorrow please note service replaced bus open closed left right",
)
FORMS = ("question", "messages")


def write_rows(path: Path, rows: int, form: str) -> None:
    """A file of questions and answers, or of chats of two turns, of about 60 tokens a row."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            if form == "question":
                row: dict[str, Any] = {"question": f"{number} {text(26)}", "answer": text(26)}
            else:
                contents = (f"{number} {text(12)}", text(12), text(12), text(12))
                roles = ("user", "assistant") * 2
                row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}
            file.write(json.dumps(row) + "\n")


def make_model(folder: Path) -> None:
    """A small random LLaMA with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    packaged = pretrained_folder(DEFAULT)
    if packaged is None:
        raise SystemExit("the packaged model is missing: run `prefixtune prepare` first.")
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_training(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run `prefixtune train`; its seconds, those before its first step, and its peak memory in MB."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "prefixtune", "train", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = {"RssAnon": 0, "VmHWM": 0}
    events = Path(arguments[arguments.index("--output") + 1]) / "events.jsonl"
    first_step = 0.0
    while child.poll() is None:
        for name, value in _memory(child.pid).items():
            peak[name] = max(peak[name], value)
        if not first_step and events.is_file() and events.stat().st_size:
            first_step = time.perf_counter() - begin
        time.sleep(0.02)
    errors = child.stderr.read() if child.stderr is not None else ""
    if child.returncode:
        raise SystemExit(errors)
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "seconds_to_first_step": round(first_step, 1),
        "peak_mb": round(peak["VmHWM"] / 1024),
        "peak_anonymous_mb": round(peak["RssAnon"] / 1024),
    }


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes of a process; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {field[0].removesuffix(":"): int(field[1]) for field in fields}


def measure(folder: Path, rows: int, form: str, steps: int) -> dict[str, Any]:
    """Both runs on one file."""
    data = folder / f"{form}-{rows}.jsonl"
    write_rows(data, rows, form)
    result: dict[str, Any] = {"rows": rows, "form": form, "file_mb": round(data.stat().st_size / 1e6)}
    environment = {**os.environ, "PREFIXTUNE_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    for name in ("first", "second"):
        output = folder / f"run-{form}-{rows}-{name}"
        options = f"--prefix-length 4 --max-steps {steps} --batch-size 8 --hold-out 0.001 --dtype float32"
        result[name] = run_training(
            ["--backbone", str(folder / "model"), "--train", str(data), "--output", str(output), *options.split()],
            environment,
        )
    kept = folder / "home" / "data"
    result["cache_mb"] = round(sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) / 1e6)
    return result


def main() -> None:
    """Measure, print one line for each file, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name:
        make_model(Path(name) / "model")
        for form in arguments.forms:
            for rows in arguments.rows:
                results.append(measure(Path(name), rows, form, arguments.steps))
                print(json.dumps(results[-1]), flush=True)
    if arguments.output is not None:
        facts = {"command": command_line(), **describe(), "results": results}
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
