"""Write `docs/scale.md`: what a fleet that serves prefixes needs, worked out and simulated.

    python docs/scale.py            # write the page
    python docs/scale.py --check    # only see whether it is up to date

Sizes follow from the backbones' published shapes. Speeds are those that `bench/decode.py` measured
(`STEPS`); nothing here was run on a GPU. The simulation of caches is exact for what it assumes: requests whose
tasks are drawn by Zipf's law, one after the other.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("scale.md")
HALF = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True)
class Model:
    """A backbone's published shape.

    Attributes:
        name: What it is called.
        parameters: How many.
        layers: Of attention.
        kv_heads: Of each layer.
        head_dim: Of keys and values.
    """

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def position_bytes(self) -> int:
        """What one position of keys and values takes in bfloat16: of a prefix, and of a running text."""
        return 2 * self.layers * self.kv_heads * self.head_dim * HALF

    @property
    def weight_bytes(self) -> float:
        """What the weights take in bfloat16."""
        return self.parameters * HALF


MODELS = (
    Model("SmolLM2-135M", 0.135e9, 30, 3, 64),
    Model("GPT-2 Medium", 0.355e9, 24, 16, 64),
    Model("Llama-3.2-1B", 1.24e9, 16, 8, 64),
    Model("Qwen2.5-7B", 7.62e9, 28, 4, 128),
    Model("Llama-3.1-8B", 8.03e9, 32, 8, 128),
    Model("Llama-3.1-70B", 70.6e9, 80, 8, 128),
)
DEVICES = {"24 GiB": 24, "80 GiB": 80, "8 x 80 GiB": 640}
KEPT_FREE = 0.1
"""Share of a device's memory that is left to products and the allocator."""

STEPS = {
    (1, 0): 0.0305,
    (1, 10): 0.0294,
    (1, 200): 0.0300,
    (8, 0): 0.0355,
    (8, 10): 0.0348,
    (8, 200): 0.0412,
    (32, 0): 0.0672,
    (32, 10): 0.0703,
    (32, 200): 0.0862,
    (64, 0): 0.1124,
    (64, 10): 0.1226,
    (64, 200): 0.1562,
}
"""Seconds of a decode step by texts and P, each text with a prefix of its own: `bench/decode.py`, SmolLM2-135M in
bfloat16 on two cores, 2026-11-25."""

REPLICAS, TASKS, REQUESTS = 8, 10_000, 200_000
CACHES = (100, 300, 1_000)
COLD = ("SmolLM2-135M", "Llama-3.1-8B", "Llama-3.1-70B")


def prefixes_table(length: int = 10, text: int = 512) -> list[str]:
    """Memory of a prefix and of a running text."""
    lines = [
        f"| backbone | weights, GiB | P = {length}, KiB | 10,000 of them, GiB | a text of {text} positions, MiB |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        prefix = model.position_bytes * length
        lines.append(
            f"| {model.name} | {model.weight_bytes / 2**30:.1f} | {prefix / 2**10:,.0f} | {prefix * 1e4 / 2**30:.1f} "
            f"| {model.position_bytes * text / 2**20:,.1f} |"
        )
    return lines


def room_table(texts: int = 64, length: int = 10, text: int = 512) -> list[str]:
    """How many tasks a device holds beside its weights and running texts."""
    lines = [f"| backbone | {' | '.join(DEVICES)} |", "|---|" + "---|" * len(DEVICES)]
    for model in MODELS:
        cells = []
        for gib in DEVICES.values():
            running = texts * model.position_bytes * (text + length)
            left = gib * 2**30 * (1 - KEPT_FREE) - model.weight_bytes - running
            count = int(left // (model.position_bytes * length))
            cells.append(f"{count:,}" if count > 0 else "does not fit")
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return lines


def length_table() -> list[str]:
    """Tokens a second by the number of texts and the prefix's length."""
    counts, lengths = (sorted({pair[place] for pair in STEPS}) for place in (0, 1))
    lines = [f"| texts at once | {' | '.join(f'P = {length}' for length in lengths)} |"]
    lines.append("|---|" + "---|" * len(lengths))
    for count in counts:
        cells = (f"{count / STEPS[count, length]:,.0f}" for length in lengths)
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def simulate(route: Callable[[int, random.Random], int], capacity: int, replicas: int = REPLICAS) -> float:
    """The share of requests that find their prefix in their replica's cache, by which the least recent one is dropped.

    Args:
        route: Task -> replica.
        capacity: Prefixes that a replica keeps.
        replicas: How many.
    """
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, TASKS + 1)]
    tasks = draw.choices(range(TASKS), weights=weights, k=REQUESTS)
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    hits = counted = 0
    for number, task in enumerate(tasks):
        cache = caches[route(task, draw)]
        found = task in cache
        if found:
            cache.move_to_end(task)
        else:
            cache[task] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
        # The first quarter fills the caches.
        if number >= REQUESTS // 4:
            hits += found
            counted += 1
    return hits / counted


def anywhere(task: int, draw: random.Random) -> int:
    """As a plain load balancer does."""
    return draw.randrange(REPLICAS)


def by_prefix(task: int, draw: random.Random) -> int:
    """Each task always to one replica."""
    return (task * 2_654_435_761 >> 7) % REPLICAS


def hot_anywhere(task: int, draw: random.Random) -> int:
    """The hundred most asked for to any replica, each of the others to one."""
    return anywhere(task, draw) if task < 100 else by_prefix(task, draw)


def routing_table() -> list[str]:
    """Hit rates by routing and cache."""
    lines = [
        f"| routing | {' | '.join(f'{size:,} prefixes a replica' for size in CACHES)} |",
        "|---|" + "---|" * len(CACHES),
    ]
    named = {
        "any replica": anywhere,
        "by prefix": by_prefix,
        "by prefix, the 100 hottest to any": hot_anywhere,
    }
    for name, route in named.items():
        lines.append(f"| {name} | {' | '.join(f'{simulate(route, size):.3f}' for size in CACHES)} |")
    return lines


TEXT = """# From one machine to a fleet

Worked out by `python docs/scale.py`, which writes this page. Sizes follow from published shapes. Speeds are those
measured on two CPU cores; nothing on this page was run on a GPU, and none of it on more than one machine.

## What it takes

Keys and values in bfloat16. A prefix takes as much as so many positions of a running text, so that a hundred tasks of
P = 10 cost what two texts of 512 positions do.

{sizes}

So many tasks of P = 10 does a device hold in its own memory, beside the weights and 64 running texts of 512
positions, with a tenth kept free. All others wait in the machine's memory or on its disk, and are copied in when
asked for.

{room}

Where even the weights do not fit, shard the backbone (tensor parallelism: each device takes its KV heads of every
prefix) before anything else; prefixes are never the reason to.

## How throughput moves

Tokens a second by `bench/decode.py`: SmolLM2-135M in bfloat16, texts of about 80 positions besides the prefix, each
with a prefix of its own, nothing read meanwhile.

{speeds}

A step of one text costs nearly what one of eight does; from about 32 on the products themselves take the time. A
prefix lengthens attention alone. The number of different tasks in a batch does not enter: 32 prefixes ran as fast as
one (`bench/serve.py`). What it costs to have many tasks is memory, and the misses of a cache.

## Routing

{replicas} replicas, {tasks:,} tasks asked for by Zipf's law, {requests:,} requests, each replica with a cache of its
own that drops what was used least recently. The share of requests that find their prefix there:

{routing}

So a plain load balancer will do while the caches hold what is asked for, and that is cheap: 10,000 prefixes of P = 10
for an 8B model take 12 GiB of a machine's memory. Below that, hash the model's name (`hash` in nginx,
`consistentHash` in Envoy) and let the hottest go anywhere, or one replica has them all to itself.

## A prefix that is not there

From object storage, at 50 ms to the first byte and 100 MB a second (assumed): {cold}. From a disk beside it, a few
milliseconds. A miss delays its own request and nobody else's: `prefixtune serve` loads in a thread, and checks a file
as a whole before it is used.

## Which tool, when

| | what to use |
|---|---|
| one machine, CPU or one GPU, hundreds of tasks | `prefixtune serve` |
| more requests than one machine takes | replicas behind nginx or any load balancer, and one folder of prefixes; \
`deploy/nginx.conf` is tested with two |
| a backbone larger than a device | train with `--shard`; serve with `--engine vllm` and its tensor parallelism |
| studies and many training runs | `prefixtune study` in as many processes as there are devices, or `--ray N` over a \
cluster; `train --together` for small batches on one |
"""


def page() -> str:
    """The whole page."""
    waits = ((model.name, 0.05 + model.position_bytes * 10 / 100e6) for model in MODELS if model.name in COLD)
    return TEXT.format(
        sizes="\n".join(prefixes_table()),
        room="\n".join(room_table()),
        speeds="\n".join(length_table()),
        replicas=REPLICAS,
        tasks=TASKS,
        requests=REQUESTS,
        routing="\n".join(routing_table()),
        cold=", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in waits),
    )


def main() -> int:
    """Write the page, or see whether it is up to date."""
    made = page()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
