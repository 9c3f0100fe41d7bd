"""Measure joined prefixes: requests that join three each, against one prefix of the same total length each.

    python -m bench.serving.joined              # ten minutes on two cores
    python -m bench.serving.joined --quick      # only to see that it works

`prefixtune serve` runs in a process of its own and gets all requests of a round at once over loopback. The sides take
turns in one run, A B C, C B A, ...; a ratio is the median of the paired ratios, with its quartiles in brackets:

- one: each request has a prefix of its own, a file that was composed of three before;
- joined: each request joins the same three parts, so that the server has joined them before;
- new: each request joins three parts that nobody has joined yet.

The texts of `one` and `joined` are compared: they are the same up to rounding.

Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import torch

from bench import data
from bench.results import FOLDER, DifferenceError, Figure, Log, Results, run_benchmark
from bench.serving.load import Server
from bench.serving.serve import make_prompts
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.words import from_words

SEED = 0
GOAL, FLOOR = 0.97, 0.93
PARTS, JOINED = 24, 3
"""Files of parts, and how many a request joins."""
# requests, tokens in, tokens out, positions of a part
FULL, QUICK = (32, 64, 64, 32), (4, 16, 6, 4)
LEAST_AGREEMENT = 0.5
"""Least share of equal texts; bfloat16 may change a close choice."""
SIDES = ("one", "joined", "new")

Mixes = list[tuple[int, ...]]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 9; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / "joined.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 9)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn."""
    requests, tokens_in, new, length = QUICK if options.quick else FULL
    backbone = load_backbone(options.backbone, dtype="bfloat16", device="cpu")
    examples = data.read(None)
    prompts = make_prompts(backbone, examples, requests * (options.repeats + 1), tokens_in)
    title = f"{requests} requests, {tokens_in} in, {new} out, {JOINED} x P = {length}"
    log(title)
    unused = unused_mixes()
    mixes = list(itertools.islice(unused, requests))
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name:
        folder = Path(name)
        texts = [example.source for example in random.Random(SEED).sample(examples.examples, PARTS)]
        write_prefixes(backbone, texts, length, mixes, folder / "prefixes")
        # Its memory is the server's from here on.
        del backbone
        command = [sys.executable, "-m", "prefixtune", "serve"]
        server = Server(command, options.backbone, folder, {}, slots=requests, queue=requests, dtype="bfloat16")
        try:
            server.wait()
            seconds, agreement = asyncio.run(take_turns(server.url, prompts, mixes, unused, new, log))
        finally:
            server.stop()
    ratios = {
        f"{side} / one": [b / a for a, b in zip(seconds[side], seconds["one"], strict=True)] for side in SIDES[1:]
    }
    values = {
        "settings": {
            "requests": requests,
            "tokens_in": tokens_in,
            "tokens_out": new,
            "parts": JOINED,
            "part_length": length,
        },
        "dtype": "bfloat16",
        "seconds": seconds,
        "speed_ratios": ratios,
        "texts_agreeing": agreement,
        "floor": FLOOR,
    }
    return values, report(title, values)


def write_prefixes(backbone: Backbone, texts: Sequence[str], length: int, mixes: Mixes, folder: Path) -> None:
    """The parts, from different words, and a composed file for each mix."""
    folder.mkdir()
    header = make_header(backbone)
    parts = [Prefix(from_words(backbone, text, length).to(torch.bfloat16).layers, header) for text in texts]
    for index, part in enumerate(parts):
        save_prefix(folder / f"part-{index}.safetensors", part, dtype=torch.bfloat16)
    for index, mix in enumerate(mixes):
        one = concatenate([parts[part] for part in mix], backbone.rotation)
        save_prefix(folder / f"one-{index}.safetensors", one, dtype=torch.bfloat16)


def unused_mixes() -> Iterator[tuple[int, ...]]:
    """Different triples of parts, at random."""
    triples = list(itertools.permutations(range(PARTS), JOINED))
    random.Random(SEED).shuffle(triples)
    yield from triples


async def take_turns(
    url: str, prompts: Sequence[Sequence[int]], mixes: Mixes, unused: Iterator[tuple[int, ...]], new: int, log: Log
) -> tuple[dict[str, list[float]], float]:
    """Seconds of the sides by round, and the share of equal texts of `one` and `joined`; the first round warms up.

    Raises:
        DifferenceError: The share is below `LEAST_AGREEMENT`.
    """
    requests = len(mixes)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    texts: dict[str, list[str]] = {side: [] for side in SIDES}
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        for index in range(len(prompts) // requests):
            chosen = prompts[index * requests : (index + 1) * requests]
            for side in SIDES if index % 2 else reversed(SIDES):
                names = names_of(side, mixes, unused)
                began = time.perf_counter()
                texts[side] += await asyncio.gather(
                    *(complete(client, name, prompt, new) for name, prompt in zip(names, chosen, strict=True))
                )
                if index:
                    seconds[side].append(time.perf_counter() - began)
            if index:
                log(f"  {index}: " + ", ".join(f"{side} {taken[-1]:.2f} s" for side, taken in seconds.items()))
    agreement = sum(a == b for a, b in zip(texts["one"], texts["joined"], strict=True)) / len(texts["one"])
    if agreement < LEAST_AGREEMENT:
        raise DifferenceError(f"only {agreement:.0%} of the texts of 'one' and 'joined' are the same.")
    return seconds, agreement


def names_of(side: str, mixes: Mixes, unused: Iterator[tuple[int, ...]]) -> list[str]:
    """The model of each request."""
    if side == "one":
        return [f"one-{index}" for index in range(len(mixes))]
    chosen = mixes if side == "joined" else list(itertools.islice(unused, len(mixes)))
    return ["+".join(f"part-{part}" for part in mix) for mix in chosen]


async def complete(client: httpx2.AsyncClient, model: str, prompt: Sequence[int], new: int) -> str:
    """The text of one request.

    Raises:
        DifferenceError: It has another number of tokens.
    """
    body = {"model": model, "prompt": list(prompt), "max_tokens": new, "min_tokens": new, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    answer = response.json()
    if answer["usage"]["completion_tokens"] != new:
        raise DifferenceError(f"{new} new tokens were requested, but {model!r} generated {answer['usage']}.")
    return str(answer["choices"][0]["text"])


def report(title: str, values: Mapping[str, Any]) -> list[Figure]:
    """The table's lines."""
    settings = values["settings"]
    count = settings["requests"] * settings["tokens_out"]
    labels = {"one": "one prefix each", "joined": "three joined each", "new": "three joined anew each"}
    figures = [
        Figure("joined", f"{title}: {labels[side]}", count / median(values["seconds"][side]), "tokens/s")
        for side in SIDES
    ]
    for name, ratios in values["speed_ratios"].items():
        side = name.partition(" ")[0]
        low, high = min(ratios), max(ratios)
        with contextlib.suppress(ValueError):
            low, _, high = quantiles(ratios, n=4, method="inclusive")
        label = f"{labels[side]} / {labels['one']} ({low:.3f} to {high:.3f}; floor {FLOOR})"
        figures.append(Figure("joined", label, median(ratios), "x", at_least=GOAL))
    figures.append(Figure("joined", "texts of one and joined that are the same", values["texts_agreeing"]))
    return figures


if __name__ == "__main__":
    sys.exit(main())
