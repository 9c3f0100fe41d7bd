"""Measure mixed work on a real server: a thousand prefixes, long texts beside short ones, memories beside prefixes.

    python -m bench.serving.mixed              # a quarter of an hour on two cores
    python -m bench.serving.mixed --quick      # only to see that it works

`prefixtune serve` runs in a process of its own, and the sides take turns in one run, A B C, C B A, ...; a ratio is the
median of the paired ratios.

- one: 96 requests, 32 at a time, all with one prefix; many: each with one of 1,000 prefixes in the folder, drawn by
  Zipf's law, so that some are asked for all the time and most seldom or never. The server reads what it has not got.
- memories: the same, half of the requests with a memory of 512 positions, each of one of eight.
- gap: eight streams of short texts; the longest wait between two pieces of one of them while nothing else comes
  (quiet), and while two texts of 1,000 tokens come (long).

Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import torch

from bench import data
from bench.results import FOLDER, Figure, Log, Results, run_benchmark
from bench.serving.joined import complete
from bench.serving.load import Server, add_noise
from bench.serving.serve import make_prompts
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.starts.words import from_words

SEED, SLOTS = 0, 32
GOAL = 0.98
SIDES = ("one", "many", "memories")
# requests of a round, prefixes, positions of a prefix, memories, positions of a memory, tokens in, tokens out
FULL, QUICK = (96, 1000, 10, 8, 512, 64, 64), (6, 20, 4, 2, 16, 16, 6)
STREAMS, LONG_TEXTS, LONG, PIECES = 8, 2, 1000, 200
STARTING_SECONDS = 120.0
"""Longest wait for the first pieces of a stream."""
ZIPF = 1.0
"""The n-th prefix is drawn in proportion to 1 / n to this power."""


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / "mixed.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 5)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn, then the gaps."""
    requests, prefixes, length, memories, memory_length, tokens_in, new = QUICK if options.quick else FULL
    backbone = load_backbone(options.backbone, dtype="bfloat16", device="cpu")
    examples = data.read(None)
    prompts = make_prompts(backbone, examples, requests * (options.repeats + 1), tokens_in)
    long_texts = make_prompts(backbone, examples, LONG_TEXTS * options.repeats, LONG // (20 if options.quick else 1))
    with tempfile.TemporaryDirectory(prefix="prefixtune-bench-") as name:
        folder = Path(name)
        log(f"{prefixes} prefixes of {length} positions, {memories} memories of {memory_length}")
        (folder / "prefixes").mkdir()
        write_prefixes(backbone, folder / "prefixes", "p", prefixes, length)
        write_prefixes(backbone, folder / "prefixes", "memory", memories, memory_length)
        # Its memory is the server's from here on.
        del backbone
        command = [sys.executable, "-m", "prefixtune", "serve"]
        server = Server(command, options.backbone, folder, {}, slots=SLOTS, queue=requests, dtype="bfloat16")
        try:
            server.wait()
            seconds = asyncio.run(take_turns(server.url, prompts, requests, prefixes, memories, new, log))
            pieces = PIECES // (10 if options.quick else 1)
            gaps = asyncio.run(longest_gaps(server.url, prompts[:STREAMS], long_texts, options.repeats, pieces, log))
        finally:
            server.stop()
    values = {
        "settings": {
            "requests": requests,
            "slots": SLOTS,
            "prefixes": prefixes,
            "prefix_length": length,
            "memories": memories,
            "memory_length": memory_length,
            "tokens_in": tokens_in,
            "tokens_out": new,
            "long_text": len(long_texts[0]),
        },
        "dtype": "bfloat16",
        "seconds": seconds,
        "longest_gap_seconds": gaps,
    }
    return values, report(values)


def write_prefixes(backbone: Backbone, folder: Path, name: str, count: int, length: int) -> None:
    """Files of different prefixes: keys and values of words, plus random noise."""
    start = from_words(backbone, "Describe the restaurant in one sentence:", length).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED)
    for index in range(count):
        layers = {
            site: tuple((add_noise(key, generator), add_noise(value, generator)) for key, value in pairs)
            for site, pairs in start.layers.items()
        }
        prefix = Prefix(layers, make_header(backbone))
        save_prefix(folder / f"{name}-{index}.safetensors", prefix, dtype=torch.bfloat16)


def names_of(side: str, requests: int, prefixes: int, memories: int, draw: random.Random) -> list[str]:
    """The model of each request of a round."""
    if side == "one":
        return ["p-0"] * requests
    weights = [1 / rank**ZIPF for rank in range(1, prefixes + 1)]
    names = [f"p-{index}" for index in draw.choices(range(prefixes), weights, k=requests)]
    if side == "memories":
        names[::2] = [f"memory-{draw.randrange(memories)}" for _ in names[::2]]
    return names


async def take_turns(
    url: str, prompts: Sequence[Sequence[int]], requests: int, prefixes: int, memories: int, new: int, log: Log
) -> dict[str, list[float]]:
    """Seconds of the sides by round; the first round warms up."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    draw = random.Random(SEED)
    async with httpx2.AsyncClient(base_url=url, timeout=1200) as client:
        for index in range(len(prompts) // requests):
            chosen = prompts[index * requests : (index + 1) * requests]
            for side in SIDES if index % 2 else reversed(SIDES):
                names = names_of(side, requests, prefixes, memories, draw)
                began = time.perf_counter()
                await asyncio.gather(
                    *(complete(client, name, prompt, new) for name, prompt in zip(names, chosen, strict=True))
                )
                if index:
                    seconds[side].append(time.perf_counter() - began)
            if index:
                log(f"  {index}: " + ", ".join(f"{side} {taken[-1]:.2f} s" for side, taken in seconds.items()))
    return seconds


async def longest_gaps(
    url: str,
    prompts: Sequence[Sequence[int]],
    long_texts: Sequence[Sequence[int]],
    repeats: int,
    pieces: int,
    log: Log,
) -> dict[str, list[float]]:
    """The longest wait between two pieces of any of the streams, by round, without long texts and with them."""
    gaps: dict[str, list[float]] = {"quiet": [], "long": []}
    async with httpx2.AsyncClient(base_url=url, timeout=1200) as client:
        for index, side in itertools.product(range(repeats), gaps):
            started = asyncio.Event()
            streams = [asyncio.create_task(stream(client, prompt, pieces, started)) for prompt in prompts]
            if side == "long":
                # A stream that fails never says so.
                await asyncio.wait_for(started.wait(), STARTING_SECONDS)
                texts = long_texts[index * LONG_TEXTS : (index + 1) * LONG_TEXTS]
                await asyncio.gather(*(complete(client, "p-1", text, 1) for text in texts))
            gaps[side].append(max(await asyncio.gather(*streams)))
            log(f"  longest gap, {side}: {gaps[side][-1]:.3f} s")
    return gaps


async def stream(client: httpx2.AsyncClient, prompt: Sequence[int], pieces: int, started: asyncio.Event) -> float:
    """The longest wait between two pieces of a streamed text; `started` is set at the tenth."""
    body = {"model": "p-0", "prompt": list(prompt), "max_tokens": pieces, "min_tokens": pieces, "stream": True}
    stamps = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                stamps.append(time.perf_counter())
                if len(stamps) == min(10, pieces):
                    started.set()
    return longest(stamps)


def longest(stamps: Iterable[float]) -> float:
    """The longest time between two."""
    return max((later - earlier for earlier, later in itertools.pairwise(stamps)), default=0.0)


def report(values: Mapping[str, Any]) -> list[Figure]:
    """The table's lines."""
    settings, seconds = values["settings"], values["seconds"]
    count = settings["requests"] * settings["tokens_out"]
    labels = {
        "one": "one prefix",
        "many": f"{settings['prefixes']} prefixes by Zipf's law",
        "memories": f"half with memories of {settings['memory_length']}",
    }
    title = f"{settings['requests']} x ({settings['tokens_in']} in, {settings['tokens_out']} out)"
    figures = [Figure("mixed", f"{title}: {labels[side]}", count / median(seconds[side]), "tokens/s") for side in SIDES]
    for side, goal in (("many", GOAL), ("memories", None)):
        ratio = median(one / taken for one, taken in zip(seconds["one"], seconds[side], strict=True))
        figures.append(Figure("mixed", f"{labels[side]} / {labels['one']}", ratio, "x", at_least=goal))
    for side, label in (("quiet", "alone"), ("long", f"while texts of {settings['long_text']} tokens come")):
        gap = median(values["longest_gap_seconds"][side])
        figures.append(Figure("gap", f"longest gap of {STREAMS} streams {label}", gap, "s"))
    return figures


if __name__ == "__main__":
    sys.exit(main())
