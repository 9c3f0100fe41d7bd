"""Measure serving: many requests at once, each with a prefix of its own, against one prefix, none, and other ways.

    python -m bench.serving.serve              # about a quarter of an hour on two cores
    python -m bench.serving.serve --quick      # only to see that it works

All sides generate the same number of tokens for the same prompts (the end token is suppressed), greedily, on one
machine, in turn in one run; a ratio is the median of the paired ratios. The sides: the engine with 32 prefixes, with
one and with none; transformers' batched `generate` with one prefix; PEFT with 32 adapters on one model, switched for
every request; and, if `--vllm-python` names an environment with it, vLLM's server with this project's plugin, with
the same 32 prefixes and without any, over loopback.

Needs `prefixtune prepare` once, and PEFT.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench import data
from bench.data import Data
from bench.machine import reset_peak_memory, resident_mib
from bench.results import FOLDER, DifferenceError, Figure, Log, Results, run_benchmark
from bench.serving.sides import (
    PREFIX_LENGTH,
    EngineSide,
    GenerateSide,
    PeftSide,
    Side,
    Tokens,
    VllmServer,
    VllmSide,
    save_prefixes,
)
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.worker import EngineWorker
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.server.models.store import PrefixStore
from prefixtune.training.starts.words import from_words

SEED = 0
# requests, tokens in, tokens out, prefixes in the store
FULL, QUICK = (32, 64, 64, 200), (4, 16, 6, 10)
LEAST_AGREEMENT = 0.5
"""Least share of requests whose first token is the same on two sides; bfloat16 may change a close choice."""

NAMES = {
    "different": "engine, a prefix for each request",
    "one": "engine, one prefix",
    "none": "engine, no prefix",
    "generate": "transformers' batched generate, one prefix",
    "peft": "PEFT, an adapter for each request, switched",
    "vllm": "vLLM's server, no prefix",
    "vllm-different": "vLLM's server and the plugin, a prefix for each request",
}
GOALS = (
    ("different", "one", 0.98),
    ("different", "none", 0.98),
    ("different", "generate", 3),
    ("different", "peft", 8),
    ("different", "vllm", 1.2),
    ("different", "vllm-different", None),
    ("vllm-different", "vllm", 0.97),
)
SAME_OUTPUT = (
    ("different", "peft"),
    ("one", "generate"),
    ("none", "vllm"),
    ("different", "vllm-different"),
)
"""Pairs of sides whose outputs are the same up to rounding."""


@dataclass
class Timing:
    """Times of the sides.

    Attributes:
        seconds: Side -> seconds of each round.
        agreement: Pair of sides -> share of requests whose first token is the same.
        first: Seconds to each first token, with different prefixes.
        between: Seconds between tokens, with different prefixes.
    """

    seconds: dict[str, list[float]]
    agreement: dict[str, float] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 7; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--without-peft", action="store_true", help="leave that side out")
    parser.add_argument(
        "--vllm-python", type=Path, help="Python of an environment with vLLM: its server is measured, too"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=FOLDER / "serve.json",
        help="where the figures go (default bench/results/serve.json)",
    )
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 7)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    return options


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console.info))


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn, and the memory of prefixes."""
    requests, tokens_in, new, stored = QUICK if options.quick else FULL
    backbone = load_backbone(options.backbone, dtype="bfloat16", device="cpu")
    examples = data.read(None)
    prefixes = make_prefixes(backbone, examples, requests)
    prompts = make_prompts(backbone, examples, requests * (options.repeats + 1), tokens_in)
    dtype = str(backbone.dtype).removeprefix("torch.")
    title = f"{requests} requests, {tokens_in} in, {new} out, P = {PREFIX_LENGTH}, {dtype}"
    log(title)
    memory = measure_memory(backbone, prefixes[0], stored)
    with EngineWorker(Engine(backbone, EngineConfig(num_slots=requests))) as worker:
        with open_sides(options, worker, backbone, prefixes, new) as sides:
            timing = take_turns(sides, prompts, requests, new, log)
        memory["slots_bytes"] = worker.engine.runner.kv_cache.num_bytes
    values = {
        "data": examples.describe(),
        "settings": {"requests": requests, "tokens_in": tokens_in, "tokens_out": new, "prefix_length": PREFIX_LENGTH},
        "dtype": dtype,
        "seconds": timing.seconds,
        "tokens_per_second": {side: requests * new / median(taken) for side, taken in timing.seconds.items()},
        "speed_ratios": {
            f"{one} / {other}": [b / a for a, b in zip(timing.seconds[one], timing.seconds[other], strict=True)]
            for one, other, _ in GOALS
            if {one, other} <= timing.seconds.keys()
        },
        "first_tokens_agreeing": timing.agreement,
        "latency_seconds": {
            "first_token": percentiles(timing.first),
            "between_tokens": percentiles(timing.between),
        },
        "memory": memory,
    }
    return values, report(title, values)


@contextmanager
def open_sides(
    options: argparse.Namespace, worker: EngineWorker, backbone: Backbone, prefixes: Sequence[Prefix], new: int
) -> Iterator[dict[str, Side]]:
    """All sides, until the block ends."""
    requests = len(prefixes)
    sides: dict[str, Side] = {
        "different": EngineSide(worker, prefixes, new),
        "one": EngineSide(worker, [prefixes[0]] * requests, new),
        "none": EngineSide(worker, [None] * requests, new),
        "generate": GenerateSide(backbone, prefixes[0], new),
    }
    if not options.without_peft:
        sides["peft"] = PeftSide(options.backbone, backbone.dtype, prefixes, new)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_prefixes(folder, backbone, prefixes)
        if options.vllm_python is not None:
            server = VllmServer(options.vllm_python, backbone, folder)
            stack.callback(server.close)
            sides["vllm"] = VllmSide(server, ["m"] * requests, new)
            sides["vllm-different"] = VllmSide(server, [f"p{index}" for index in range(requests)], new)
        yield sides


def report(title: str, values: Mapping[str, Any]) -> list[Figure]:
    """The table's lines."""
    speeds, ratios, memory = values["tokens_per_second"], values["speed_ratios"], values["memory"]
    figures = [
        Figure("serve", f"{title}: {name}", speeds[side], "tokens/s") for side, name in NAMES.items() if side in speeds
    ]
    for one, other, goal in GOALS:
        name = f"{NAMES[one]} / {NAMES[other]}"
        if f"{one} / {other}" in ratios:
            figures.append(Figure("serve", name, median(ratios[f"{one} / {other}"]), "x", at_least=goal))
        else:
            figures.append(Figure("serve", name, None, reason="left out"))
    for name, latency in values["latency_seconds"].items():
        for percentile, seconds in latency.items():
            label = f"{NAMES['different']}, {name.replace('_', ' ')}, {percentile}"
            figures.append(Figure("serve", label, seconds * 1000, "ms"))
    if memory["resident_mib_per_1000"] is not None:
        figures.append(Figure("serve", "memory of 1,000 loaded prefixes", memory["resident_mib_per_1000"], "MiB"))
    figures.append(Figure("serve", "their tensors alone", memory["tensor_mib_per_1000"], "MiB"))
    slots = values["settings"]["requests"]
    figures.append(Figure("serve", f"keys and values of {slots} slots", memory["slots_bytes"] / 2**20, "MiB"))
    return figures


def make_prefixes(backbone: Backbone, examples: Data, count: int) -> list[Prefix]:
    """Different prefixes, from different words."""
    return [
        from_words(backbone, f"Describe in one sentence: {example.source}", PREFIX_LENGTH).to(backbone.dtype)
        for example in random.Random(SEED).sample(examples.examples, count)
    ]


def make_prompts(backbone: Backbone, examples: Data, count: int, length: int) -> list[list[int]]:
    """Different prompts of exactly `length` tokens."""
    draw = random.Random(SEED + 1)
    prompts = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += backbone.encode(f"{draw.choice(examples.examples).source}\n")
        prompts.append(ids[:length])
    return prompts


def take_turns(sides: Mapping[str, Side], prompts: Tokens, requests: int, new: int, log: Log) -> Timing:
    """Let all sides serve the same requests in turn, A B C, C B A, ...; the first round warms up.

    Raises:
        DifferenceError: A side generated another number of tokens, or clearly another text.
    """
    order = list(sides)
    timing = Timing({side: [] for side in order})
    first_ids: dict[str, list[int]] = {side: [] for side in order}
    for index in range(len(prompts) // requests):
        chosen = prompts[index * requests : (index + 1) * requests]
        for name in order if index % 2 else reversed(order):
            side = sides[name]
            gc.collect()
            began = time.perf_counter()
            outputs = side.serve(chosen)
            taken = time.perf_counter() - began
            lengths = {len(ids) for ids in outputs}
            if lengths != {new}:
                raise DifferenceError(f"{new} new tokens were requested, but {name!r} generated {sorted(lengths)}.")
            first_ids[name] += [ids[0] for ids in outputs]
            if index:
                timing.seconds[name].append(taken)
                if name == "different" and isinstance(side, EngineSide):
                    timing.first += side.first
                    timing.between += side.between
        if index:
            log(f"  {index}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in timing.seconds.items()))
    timing.agreement = compare_outputs(first_ids)
    return timing


def compare_outputs(first_ids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Shares of requests whose first token is the same on two sides.

    Raises:
        DifferenceError: A share is below `LEAST_AGREEMENT`.
    """
    agreement = {}
    for one, other in SAME_OUTPUT:
        if {one, other} <= first_ids.keys():
            same = sum(a == b for a, b in zip(first_ids[one], first_ids[other], strict=True)) / len(first_ids[one])
            agreement[f"{one} and {other}"] = same
            if same < LEAST_AGREEMENT:
                raise DifferenceError(f"only {same:.0%} of the first tokens of {one!r} and {other!r} are the same.")
    return agreement


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    return {"p50": median(values), "p99": quantiles(values, n=100, method="inclusive")[98]}


def measure_memory(backbone: Backbone, prefix: Prefix, count: int) -> dict[str, Any]:
    """Memory of the prefixes that a store has loaded, from the size of the process."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Prefix(prefix.layers, make_header(backbone))
        path = save_prefix(Path(folder) / "p0.safetensors", stored, dtype=torch.bfloat16)
        size = path.stat().st_size
        for index in range(1, count):
            (Path(folder) / f"p{index}.safetensors").hardlink_to(path)
        store = PrefixStore(folder, backbone, max_bytes=2**33)
        # The first one also loads code and is not counted.
        store.get("p0")
        # Returns freed memory to the system; otherwise the prefixes would fill it, and the process would not grow.
        reset_peak_memory()
        before = resident_mib()
        began = time.perf_counter()
        for index in range(1, count):
            store.get(f"p{index}")
        taken = time.perf_counter() - began
        after = resident_mib()
        grown = None if before is None or after is None else (after - before) * 1000 / (count - 1)
        return {
            "prefixes": count,
            "file_bytes": size,
            "tensor_mib_per_1000": store.stats.bytes * 1000 / count / 2**20,
            "resident_mib_per_1000": grown,
            "load_seconds_each": taken / (count - 1),
        }


if __name__ == "__main__":
    sys.exit(main())
