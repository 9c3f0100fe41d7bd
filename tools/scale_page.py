"""Write docs/scale.md: what a fleet that serves prefixes needs, computed and simulated.

    python -m tools.scale_page            # write it
    python -m tools.scale_page --check    # exit 1 if it is out of date

Sizes follow from the published shapes of the backbones. Speeds are those that `bench.serving.decode` measured; nothing
here was run on a GPU. The simulation of caches is exact under its assumption: requests one after the other, whose tasks
follow Zipf's law.
"""

from __future__ import annotations

import json
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tools.pages import DOCS, ROOT, write_or_check

PAGE = DOCS / "scale.md"
BYTES = 2
"""Of a number in bfloat16."""


@dataclass(frozen=True)
class Model:
    """A backbone's published shape.

    Attributes:
        name: The name of the model.
        parameters: Number of parameters.
        layers: Number of attention layers.
        kv_heads: KV heads of each layer.
        head_dim: Size of a head.
    """

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def position_bytes(self) -> int:
        """Bytes of the keys and values of one position, of a prefix or of a running text, in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in bfloat16."""
        return self.parameters * BYTES


MODELS = (
    Model("SmolLM2-135M", 0.135e9, 30, 3, 64),
    Model("GPT-2 Medium", 0.355e9, 24, 16, 64),
    Model("Llama-3.2-1B", 1.24e9, 16, 8, 64),
    Model("Qwen2.5-7B", 7.62e9, 28, 4, 128),
    Model("Llama-3.1-8B", 8.03e9, 32, 8, 128),
    Model("Llama-3.1-70B", 70.6e9, 80, 8, 128),
)
DEVICES = {"24 GiB": 24, "80 GiB": 80, "8 x 80 GiB": 640}
FREE_SHARE = 0.1
"""Share of a device's memory left for intermediate results and the allocator."""

STEPS = ROOT / "bench" / "results" / "decode.json"
"""Seconds of a decode step by texts and P, each text with a prefix of its own: `bench.serving.decode`."""

MIXED, SERVED = (ROOT / "bench" / "results" / f"{name}.json" for name in ("mixed", "serve"))
"""What one engine gave for many tasks at once: `bench.serving.mixed` and `bench.serving.serve`."""

REPLICAS, TASKS, REQUESTS = 8, 10_000, 200_000
CACHES = (100, 300, 1_000)
LOADED = ("SmolLM2-135M", "Llama-3.1-8B", "Llama-3.1-70B")


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


def capacity_table(texts: int = 64, length: int = 10, text: int = 512) -> list[str]:
    """The number of tasks that fit on a device together with the weights and running texts."""
    lines = [f"| backbone | {' | '.join(DEVICES)} |", "|---|" + "---|" * len(DEVICES)]
    for model in MODELS:
        cells = []
        for gib in DEVICES.values():
            running = texts * model.position_bytes * (text + length)
            left = gib * 2**30 * (1 - FREE_SHARE) - model.weight_bytes - running
            count = int(left // (model.position_bytes * length))
            cells.append(f"{count:,}" if count > 0 else "does not fit")
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return lines


def length_table() -> list[str]:
    """Tokens a second by the number of texts and the prefix's length."""
    rows = json.loads(STEPS.read_bytes())["figures"]
    seconds = {(row["texts"], row["prefix_length"]): row["seconds"] for row in rows}
    counts, lengths = (sorted({setting[axis] for setting in seconds}) for axis in (0, 1))
    lines = [f"| texts at once | {' | '.join(f'P = {length}' for length in lengths)} |"]
    lines.append("|---|" + "---|" * len(lengths))
    for count in counts:
        cells = (f"{count / seconds[count, length]:,.0f}" for length in lengths)
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def engine_table() -> list[str]:
    """What one engine on two cores gave for many tasks at once."""
    mixed, served = (json.loads(path.read_bytes()) for path in (MIXED, SERVED))
    figures = {row["what"]: row["value"] for row in (*mixed["summary"], *served["summary"])}
    sizes = mixed["settings"]
    asked = f"{sizes['requests']} x ({sizes['tokens_in']} in, {sizes['tokens_out']} out)"
    engine = "engine, a prefix for each request"
    speeds = {
        f"one prefix of P = {sizes['prefix_length']}": "one prefix",
        f"{sizes['prefixes']:,} prefixes by Zipf's law": f"{sizes['prefixes']} prefixes by Zipf's law",
        f"half of them with memories of {sizes['memory_length']} positions": f"half with memories of "
        f"{sizes['memory_length']}",
    }
    lines = ["| | |", "|---|---|"]
    lines += [f"| {title} | {figures[f'{asked}: {name}']:,.0f} tokens/s |" for title, name in speeds.items()]
    at_once = served["settings"]["requests"]
    for title, name in (("first token", "first token"), ("between two tokens", "between tokens")):
        median, slow = (figures[f"{engine}, {name}, {share}"] for share in ("p50", "p99"))
        lines.append(f"| {title}, {at_once} requests at once | {median:,.0f} ms (median), {slow:,.0f} ms (p99) |")
    texts = sizes["long_text"]
    alone = figures["longest gap of 8 streams alone"]
    beside = figures[f"longest gap of 8 streams while texts of {texts} tokens come"]
    lines.append(f"| longest gap in 8 streams; while texts of {texts:,} tokens come | {alone:.2f} s; {beside:.2f} s |")
    lines.append(f"| memory of 1,000 loaded prefixes | {figures['memory of 1,000 loaded prefixes']:,.0f} MiB |")
    return lines


def simulate(route: Callable[[int, random.Random], int], capacity: int, replicas: int = REPLICAS) -> float:
    """The share of requests that find their prefix in the cache of their replica, which drops the least recently used.

    Args:
        route: Task -> replica.
        capacity: Prefixes that a replica keeps.
        replicas: Number of replicas.
    """
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, TASKS + 1)]
    tasks = draw.choices(range(TASKS), weights=weights, k=REQUESTS)
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    hits = counted = 0
    for index, task in enumerate(tasks):
        cache = caches[route(task, draw)]
        is_hit = task in cache
        if is_hit:
            cache.move_to_end(task)
        else:
            cache[task] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
        # The first quarter fills the caches.
        if index >= REQUESTS // 4:
            hits += is_hit
            counted += 1
    return hits / counted


def anywhere(task: int, draw: random.Random) -> int:
    """Like a plain load balancer."""
    return draw.randrange(REPLICAS)


def by_prefix(task: int, draw: random.Random) -> int:
    """Every task always to the same replica."""
    return (task * 2_654_435_761 >> 7) % REPLICAS


def hot_anywhere(task: int, draw: random.Random) -> int:
    """The hundred most requested tasks to any replica, every other one always to the same."""
    return anywhere(task, draw) if task < 100 else by_prefix(task, draw)


def routing_table() -> list[str]:
    """Hit rates by routing and cache."""
    lines = [
        f"| routing | {' | '.join(f'{size:,} prefixes a replica' for size in CACHES)} |",
        "|---|" + "---|" * len(CACHES),
    ]
    routes = {
        "any replica": anywhere,
        "by prefix": by_prefix,
        "by prefix, the 100 most requested to any": hot_anywhere,
    }
    for name, route in routes.items():
        lines.append(f"| {name} | {' | '.join(f'{simulate(route, size):.3f}' for size in CACHES)} |")
    return lines


TEXT = """# From one machine to a fleet

Written by `python -m tools.scale_page`. Sizes are computed from published shapes. Speeds were measured on two CPU
cores; nothing on this page was run on a GPU, and nothing on more than one machine.

## Memory

Keys and values in bfloat16. A prefix of P positions takes as much memory as P positions of a running text, so a hundred
tasks of P = 10 take as much as two texts of 512 positions.

{sizes}

The number of tasks of P = 10 that fit into a device's own memory, together with the weights and 64 running texts of 512
positions, with a tenth kept free. All others stay in the machine's memory or on its disk, and are copied when they are
requested.

{room}

If the weights do not fit, shard the backbone (tensor parallelism: each device takes its KV heads of every prefix);
prefixes are never the reason for it.

## Throughput

Tokens per second, measured with `python -m bench.serving.decode`: SmolLM2-135M in bfloat16 on two cores, texts of about
80 positions besides the prefix, each with a prefix of its own, while no prompt is computed
(`bench/results/decode.json`).

{speeds}

A step of eight texts takes little longer than one of one text; from about 32 texts on the matrix products take the
time, and more texts at once gain nothing here. A prefix makes only attention longer. The number of different tasks in
a batch does not matter: 32 prefixes ran as fast as one (`python -m bench.serving.serve`). Many tasks cost memory and
cache misses.

One engine with many tasks at once, on the same two cores: {asked} through {slots} slots
(`python -m bench.serving.mixed`, `python -m bench.serving.serve`; each the median of its rounds).

{engine}

## Routing

{replicas} replicas, {tasks:,} tasks requested by Zipf's law, {requests:,} requests, and a cache in each replica that
drops the least recently used prefix. The share of requests that find their prefix in the cache:

{routing}

So a plain load balancer is enough while the caches hold the requested prefixes, and that is cheap: 10,000 prefixes of
P = 10 for an 8B model take 12 GiB of a machine's memory. With less memory, route by the hash of the model's name
(`hash` in nginx, `consistentHash` in Envoy) and send the most requested ones to any replica; otherwise one replica gets
all their requests.

## Loading a prefix

From object storage, with 50 ms to the first byte and 100 MB per second (assumed): {cold}. From a local disk, a few
milliseconds. A miss delays only its own request: `prefixtune serve` loads in a thread, and checks the whole file before
it is used.

## Which tool, when

| | what to use |
|---|---|
| one machine, CPU or one GPU, hundreds of tasks | `prefixtune serve` |
| more requests than one machine can serve | replicas behind nginx or any load balancer, and one folder of prefixes; \
`deploy/nginx.conf` is tested with two |
| a backbone larger than a device | train with `--shard`; serve with `--engine vllm` and its tensor parallelism |
| studies and many training runs | `prefixtune study` in as many processes as there are devices, or `--ray N` over a \
cluster; `train --together` for small batches on one |
"""


def page() -> str:
    """The whole page."""
    sizes = json.loads(MIXED.read_bytes())["settings"]
    waits = ((model.name, 0.05 + model.position_bytes * 10 / 100e6) for model in MODELS if model.name in LOADED)
    return TEXT.format(
        sizes="\n".join(prefixes_table()),
        room="\n".join(capacity_table()),
        speeds="\n".join(length_table()),
        engine="\n".join(engine_table()),
        asked="{requests} requests of {tokens_in} tokens with answers of {tokens_out}".format(**sizes),
        slots=sizes["slots"],
        replicas=REPLICAS,
        tasks=TASKS,
        requests=REQUESTS,
        routing="\n".join(routing_table()),
        cold=", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in waits),
    )


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), __doc__))
