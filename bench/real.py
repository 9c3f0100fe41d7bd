"""All commands on a model that can read, from one GGUF file: doctor, train, distill, generate, serve (`make real`).

    python -m bench.real --size 0.5b       # about 15 minutes on two cores
    python -m bench.real --size 1.5b
    python -m bench.real --gguf FILE       # any other

Each command runs as its user runs it, in a process of its own, whose time and greatest memory are kept. Then a prefix
that was trained from the file writes 40 texts with torch, on the de-quantized weights, and with llama.cpp, on the file
itself: how many are equal, and by how much torch preferred its token where they first differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bench.reading_models import MODELS, reading_model
from bench.results import ROOT, Figure, Log, PeerError, Results, make_parser, run_benchmark
from bench.server import Server
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.engine.base import Engine
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.llama_cpp import LlamaCppEngine
from prefixtune.engine.request import Request, SamplingParams, SequenceOutput, Token
from prefixtune.errors import BackboneError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.prompts import prepare_prompts

TOPICS = ("a lighthouse", "bread", "the tides", "a railway", "glass", "honey", "a violin", "snow")
ASKED = (
    "Write one sentence about {}.",
    "What is {} good for?",
    "Name three words that go with {}.",
    "Explain {} to a child.",
    "Write a question about {}.",
)
QUESTIONS = [form.format(topic) for form in ASKED for topic in TOPICS]
NEW_TOKENS = 32
_LIKELIEST = 20
"""Tokens whose probability torch tells at each place."""
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def run_command(log: Log, *words: str, text: str = "") -> dict[str, Any]:
    """Run `prefixtune` with these arguments; what it printed, its seconds, and its greatest memory in MiB.

    Raises:
        PeerError: It failed.
    """
    log(f"prefixtune {' '.join(words)}")
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefixtune", *words], stdin=subprocess.PIPE, stdout=out, stderr=errors, text=True
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        _, status, used = os.wait4(process.pid, 0)
        out.seek(0), errors.seek(0)
        if status:
            raise PeerError(f"prefixtune {words[0]}: {errors.read()[-500:].strip()}")
        printed = out.read()
    return {
        "command": " ".join(("prefixtune", *(Path(word).name if os.sep in word else word for word in words))),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": used.ru_maxrss // 1024,
        # Without the folders of this machine.
        "printed": re.sub(r"(?<!\S)/\S*/", "", printed).strip()[-2000:],
    }


def document(num_words: int) -> str:
    """The first words of this project's own pages."""
    words = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()
    return " ".join(words[:num_words])


def greedy(engine: Engine, prefix: Any, log: Log) -> list[tuple[Token, ...]]:
    """The tokens of each answer, with the two likeliest at each place."""
    config = GenerateConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    prompts = prepare_prompts(engine.backbone, QUESTIONS, [prefix] * len(QUESTIONS), config, None)
    requests = [
        Request(
            tuple(one.ids),
            one.prefix,
            SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, logprobs=_LIKELIEST, end_ids=one.ends),
        )
        for one in prompts
    ]
    log(f"{len(requests)} answers by {type(engine).__name__}")
    return [_tokens(engine, request) for request in requests]


def _tokens(engine: Engine, request: Request) -> tuple[Token, ...]:
    outputs: SimpleQueue[SequenceOutput] = SimpleQueue()
    engine.submit(request, outputs.put)
    found: list[Token] = []
    while True:
        output = outputs.get()
        if output.finish_reason == "error":
            raise PeerError(output.error)
        found += output.tokens
        if output.finish_reason is not None:
            return tuple(found)


def compare(torch_side: list[tuple[Token, ...]], other: list[tuple[Token, ...]]) -> dict[str, Any]:
    """How many texts are equal; and where each other one first differs, by how many nats torch prefers its own token.

    A token that is not among the `_LIKELIEST` of torch counts as the last of them, so its gap is at least that.
    """
    gaps = []
    for ours, theirs in zip(torch_side, other, strict=True):
        place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a.id != b.id), None)
        if place is not None:
            known = dict(ours[place].top_logprobs)
            gaps.append(round(known[ours[place].id] - known.get(theirs[place].id, min(known.values())), 3))
    count = len(torch_side)
    return {"texts": count, "same": (count - len(gaps)) / count, "gaps_in_nats": sorted(gaps)}


def measure(options: argparse.Namespace, log: Log) -> Results:
    """Each command in turn, then the two engines side by side."""
    gguf = str((options.gguf or reading_model(options.size)).absolute())
    if not Path(gguf).is_file():
        raise BackboneError(f"no file {gguf}.", hint="fetch it with `make models`.")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = [
            {"prompt": f"What colour is box {n}?", "completion": f"Box {n} is {COLOURS[n % len(COLOURS)]}, as listed."}
            for n in range(48)
        ]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        common = ("--backbone", gguf, "--quiet")
        rows["doctor"] = run_command(log, "doctor", gguf)
        trained, memory = folder / "trained", folder / "memory"
        rows["train"] = run_command(
            log, "train", *common, "--train", str(folder / "chats.jsonl"), "--dev", str(folder / "chats.jsonl"),
            "--preset", "quick", "--max-steps", str(options.steps), "--batch-size", "4", "--learning-rate", "0.002",
            "--output", str(trained),
        )  # fmt: skip
        for words in options.words:
            (folder / "document.txt").write_text(document(words))
            rows[f"distill {words} words"] = run_command(
                log, "distill", *common, "--document", str(folder / "document.txt"), "--questions", "self",
                "--num-questions", str(options.questions), "--prefix-length", "64", "--max-steps", str(options.steps),
                "--output", f"{memory}-{words}",
            )  # fmt: skip
        prefix = str(trained / "prefix.safetensors")
        for engine in ("torch", "llama.cpp"):
            rows[f"generate, {engine}"] = run_command(
                log, "generate", *common, "--prefix", prefix, "--engine", engine, "--max-new-tokens", "16", QUESTIONS[0]
            )
            rows[f"serve, {engine}"] = serve(gguf, trained, engine, log)
        shown = load_prefix(prefix)
        answers = []
        backbone = load_backbone(gguf)
        for made in make_engines(backbone, gguf):
            with made:
                answers.append(greedy(made, shown, log))
    rows["agreement"] = compare(*answers)
    figures = [
        figure
        for name, row in rows.items()
        if "seconds" in row
        for figure in (
            Figure(name, "time", row["seconds"], "s"),
            *((Figure(name, "peak memory", row["peak_mib"], "MiB"),) if "peak_mib" in row else ()),
        )
    ]
    figures.append(Figure("agreement", "same texts, llama.cpp on the file and torch", rows["agreement"]["same"]))
    return {"gguf": Path(gguf).name, "rows": rows}, figures


def make_engines(backbone: Any, gguf: str) -> list[Engine]:
    """Torch's engine on the weights in memory, and llama.cpp's on the file."""
    torch_engine = TorchEngine(backbone, num_slots=4, max_length=1024)
    return [torch_engine, LlamaCppEngine(backbone, gguf, num_slots=4, max_length=1024)]


def serve(gguf: str, prefixes: Path, engine: str, log: Log) -> dict[str, Any]:
    """Start a server, and ask eight questions at once of the prefix."""
    log(f"prefixtune serve --engine {engine}")
    began = time.perf_counter()
    command = [sys.executable, "-m", "prefixtune", "serve", "--backbone", gguf, "--engine", engine]
    server = Server(engine, [*command, "--prefixes", str(prefixes), "--port", "{port}", "--num-slots", "8"])
    try:
        ready = time.perf_counter() - began
        done = server.complete(
            [{"model": "prefix", "prompt": question, "max_tokens": NEW_TOKENS} for question in QUESTIONS[:8]]
        )
    finally:
        server.close()
    return {
        "seconds": round(ready, 1),
        "tokens_per_second": round(done.tokens / done.seconds, 1),
        "first": min(done.first),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "real", repeats=1)
    parser.add_argument("--size", default="0.5b", choices=list(MODELS), help="of `make models` (default %(default)s)")
    parser.add_argument("--gguf", type=Path, help="another model's file")
    parser.add_argument("--words", type=int, nargs="+", default=[1400], help="of the documents (default: 1400)")
    parser.add_argument("--questions", type=int, default=32, help="of a memory (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of training (default %(default)s)")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
