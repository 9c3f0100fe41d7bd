"""Put a mixed load on a real server on loopback: many prefixes, several tenants, all kinds of calls at once.

    python bench/load.py                              # five minutes, 200 prefixes
    python bench/load.py --seconds 20 --prefixes 30   # only to see that it works

The server runs in a process of its own (`prefixtune serve`, float32, so that a text is the same alone and in any mix).
What each prefix writes is worked out beforehand by `generate`, and each answer is compared with that: nobody may see
another's text or prefix. Three tenants ask as often as they are let; one of them has six times the connections of each
of the others. The calls: completions of several lengths, whole and streamed, tasks, long prompts, two texts at once,
streams that the client leaves in the middle; and an administrator who replaces prefixes.

What must hold: no error but 429, no wrong text, memory that does not grow after the first half, and tenants of equal
rights that get equal shares however many connections they have. Knows nothing of the server but its address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import machine

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.server.auth import hash_key, new_key

TENANTS = {"heavy": 6, "light": 1, "other": 1}
"""Tenant -> connections, in units of `--connections`."""
LENGTHS = (4, 8, 16)
SOURCES = ("name : Aromi | Type : pub", "name : The Vaults | area : riverside", "name : Blue Spice | food : Thai")
LONG = " | ".join(SOURCES * 4)


@dataclass
class Tally:
    """What happened.

    Attributes:
        done: Tenant -> calls answered as they should be.
        tokens: Tenant -> tokens that it got.
        busy: Tenant -> answers 429.
        left: Streams that the client left.
        replaced: Prefixes that were uploaded anew.
        seconds: Kind of call -> how long each took.
        first: Seconds to the first piece of each stream.
        faults: Everything that must not be, in words.
        memory: MiB of the server, with when.
    """

    done: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    left: int = 0
    replaced: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)


class Server:
    """`prefixtune serve` in a process of its own, with a key for each tenant and one for the administrator."""

    def __init__(
        self, command: Sequence[str], backbone: str, folder: Path, keys: dict[str, str], slots: int, queue: int
    ) -> None:
        rules = "".join(
            f'[keys.{name}]\nhash = "{hash_key(key)}"\n{"admin = true" if name == "admin" else ""}\n'
            for name, key in keys.items()
        )
        config = folder / "serve.toml"
        config.write_text(f"num_slots = {slots}\nmax_queue = {queue}\n{rules}", encoding="utf-8")
        self.log = open(folder / "server.log", "w+", encoding="utf-8")  # noqa: SIM115
        options = ["--prefixes", str(folder / "prefixes"), "--config", str(config), "--dtype", "float32", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--backbone", backbone, *options], stdout=self.log, stderr=subprocess.STDOUT
        )
        self.url = ""

    def wait(self, seconds: float = 120) -> None:
        """Wait until it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for line in Path(self.log.name).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    event = json.loads(line)
                    if event["event"] == "started":
                        self.url = event["url"]
            if self.url:
                with contextlib.suppress(httpx2.HTTPError):
                    if httpx2.get(f"{self.url}/readyz").status_code == 200:
                        return
            time.sleep(0.1)
        raise SystemExit(f"the server did not start:\n{Path(self.log.name).read_text(encoding='utf-8')}")

    def memory(self) -> float:
        """Its resident memory in MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> int:
        """Tell it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.log.close()
        return code


def make_prefixes(backbone: Backbone, folder: Path, count: int, length: int) -> list[str]:
    """Random prefixes whose texts differ: what stands at the backbone's own words, shifted at random."""
    import torch

    from prefixtune.backbone.prefixes import make_header
    from prefixtune.prefix.artifact import save_prefix
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.training.initialize import from_words

    folder.mkdir()
    start = from_words(backbone, "Describe the restaurant in one sentence:", length)
    names = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        layers = {
            site: tuple(
                tuple(part + 0.3 * part.std() * torch.randn(part.shape, generator=generator) for part in pair)
                for pair in pairs
            )
            for site, pairs in start.layers.items()
        }
        names.append(f"p{number}")
        save_prefix(folder / f"p{number}.safetensors", Prefix(layers, make_header(backbone, task="records")))
    return names


def write_all(backbone: Backbone, folder: Path, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """What each prefix writes after two prompts, a short one and a long one, greedily."""
    pairs = [(name, p) for number, name in enumerate(names) for p in (SOURCES[number % len(SOURCES)], LONG)]
    prefixes = {name: load_prefix(folder / f"{name}.safetensors", backbone) for name in names}
    prompts = [backbone.encode(prompt) for _, prompt in pairs]
    config = GenerateConfig(max_new_tokens=max(LENGTHS), batch_size=32)
    written = generate_ids(backbone, prompts, [prefixes[name] for name, _ in pairs], config=config)
    known = {}
    for pair, prompt, ids in zip(pairs, prompts, written, strict=True):
        # Beside the prompt's end: by itself, a first word may lose its space.
        known[pair] = backbone.decode([*prompt[-4:], *ids])[len(backbone.decode(prompt[-4:])) :]
    return known


class Load:
    """The callers.

    Args:
        server: Whom they call.
        keys: Tenant -> key.
        known: Prefix and prompt -> what it writes.
        seconds: How long.
    """

    def __init__(self, server: Server, keys: dict[str, str], known: dict[tuple[str, str], str], seconds: float) -> None:
        self.server, self.keys, self.known, self.seconds = server, keys, known, seconds
        self.names = sorted({name for name, _ in known})
        self.tally = Tally()
        self.limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)

    async def run(self, connections: int) -> Tally:
        """Put the load on."""
        self.begun = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            callers: list[Awaitable[None]] = [self._watch(), self._administer()]
            for tenant, share in TENANTS.items():
                client = await stack.enter_async_context(self._client(tenant))
                callers += [self._call(client, tenant, number) for number in range(share * connections)]
            await asyncio.gather(*callers)
        return self.tally

    @property
    def time_is_left(self) -> bool:
        """Whether callers go on."""
        return time.monotonic() - self.begun < self.seconds

    def _client(self, tenant: str) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx2.AsyncClient(base_url=self.server.url, headers=headers, timeout=120, limits=self.limits)

    def _ask(self, name: str, prompt: str, length: int, **more: Any) -> dict[str, Any]:
        return {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 0, **more}

    async def _call(self, client: httpx2.AsyncClient, tenant: str, number: int) -> None:
        """One connection: call after call."""
        draw = random.Random(f"{tenant}/{number}")
        kinds = (self._whole, self._streamed, self._task, self._two, self._leave)
        while self.time_is_left:
            kind = draw.choices(kinds, weights=(6, 6, 3, 2, 1))[0]
            name, prompt = draw.choice(list(self.known))
            began = time.monotonic()
            try:
                pause = await kind(client, tenant, name, prompt, draw.choice(LENGTHS))
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                self.tally.faults.append(f"{kind.__name__[1:]} of {name}: {type(error).__name__}: {error}")
                pause = 0.0
            if pause:
                await asyncio.sleep(pause)
            else:
                self.tally.seconds.setdefault(kind.__name__[1:], []).append(time.monotonic() - began)

    def _refused(self, answer: httpx2.Response, tenant: str) -> float:
        """How long to wait, where the server is busy; 0: it answered."""
        if answer.status_code == 429:
            self.tally.busy[tenant] += 1
            return min(2.0, float(answer.headers["retry-after"]))
        if answer.status_code != 200:
            raise ValueError(f"status {answer.status_code}")
        return 0.0

    def _check(self, name: str, prompt: str, text: str, what: str) -> None:
        if not self.known[name, prompt].startswith(text) or not text:
            expected = self.known[name, prompt]
            self.tally.faults.append(f"{what} of {name} is {text!r}, but alone it is {expected!r}")

    async def _whole(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        answer = await client.post("/v1/completions", json=self._ask(name, prompt, length))
        pause = self._refused(answer, tenant)
        if not pause:
            self._check(name, prompt, answer.json()["choices"][0]["text"], "completion")
            self._got(tenant, answer.json()["usage"]["completion_tokens"])
        return pause

    async def _two(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        answer = await client.post("/v1/completions", json=self._ask(name, prompt, length, n=2))
        pause = self._refused(answer, tenant)
        if not pause:
            for choice in answer.json()["choices"]:
                self._check(name, prompt, choice["text"], "completion of two")
            self._got(tenant, answer.json()["usage"]["completion_tokens"])
        return pause

    async def _task(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        body = {"source": prompt, "max_tokens": length, "temperature": 0}
        answer = await client.post(f"/v1/tasks/{name}", json=body)
        pause = self._refused(answer, tenant)
        if not pause:
            self._got(tenant, answer.json()["usage"]["completion_tokens"])
        return pause

    async def _streamed(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        return await self._stream(client, tenant, name, prompt, length, leave=False)

    async def _leave(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        return await self._stream(client, tenant, name, prompt, max(LENGTHS), leave=True)

    async def _stream(
        self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int, *, leave: bool
    ) -> float:
        body = self._ask(name, prompt, length, stream=True, stream_options={"include_usage": True})
        began, text, first = time.monotonic(), "", True
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
            pause = self._refused(answer, tenant)
            if pause:
                return pause
            async for event in _events(answer):
                if event["choices"]:
                    text += event["choices"][0]["text"]
                    if first:
                        self.tally.first.append(time.monotonic() - began)
                    first = False
                if leave and text:
                    self.tally.left += 1
                    return 0.0
                if event.get("usage"):
                    self._got(tenant, event["usage"]["completion_tokens"])
        self._check(name, prompt, text, "stream")
        return 0.0

    def _got(self, tenant: str, tokens: int) -> None:
        self.tally.done[tenant] += 1
        # What still waits at the end is mostly that of who has most connections, and comes without any competition.
        if self.time_is_left:
            self.tally.tokens[tenant] += tokens

    async def _administer(self) -> None:
        """Replace prefixes by themselves: whoever runs goes on, and whoever comes gets the same text."""
        draw, folder = random.Random("admin"), Path(self.server.log.name).parent / "prefixes"
        async with self._client("admin") as client:
            while self.time_is_left:
                name = draw.choice(self.names)
                answer = await client.put(
                    f"/admin/prefixes/{name}",
                    content=(folder / f"{name}.safetensors").read_bytes(),
                    headers={"Content-Type": "application/octet-stream"},
                )
                if answer.status_code not in (200, 201):
                    self.tally.faults.append(f"upload of {name}: status {answer.status_code}")
                self.tally.replaced += 1
                await asyncio.sleep(1)

    async def _watch(self) -> None:
        while self.time_is_left:
            self.tally.memory.append((time.monotonic() - self.begun, self.server.memory()))
            await asyncio.sleep(min(1.0, self.seconds / 20))


async def _events(answer: httpx2.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(f"the stream ended with {event['error']}")
            yield event


def summarize(tally: Tally, seconds: float) -> dict[str, Any]:
    """The figures."""
    half = [mib for when, mib in tally.memory if when >= seconds / 2]
    shares = {tenant: tally.tokens[tenant] for tenant in TENANTS}
    return {
        "calls": sum(tally.done.values()),
        "tokens_per_second": round(sum(shares.values()) / seconds, 1),
        "tokens": shares,
        "least_share": round(min(shares.values()) / max(1, max(shares.values())), 3),
        "busy": dict(tally.busy),
        "streams_left": tally.left,
        "prefixes_replaced": tally.replaced,
        "seconds": {
            kind: {"median": round(median(found), 3), "p99": round(_high(found), 3)}
            for kind, found in sorted(tally.seconds.items())
        },
        "first_piece": {"median": round(median(tally.first), 3), "p99": round(_high(tally.first), 3)},
        "memory_mib": {
            "start": round(tally.memory[0][1]),
            "half": round(half[0]),
            "end": round(half[-1]),
            "most": round(max(mib for _, mib in tally.memory)),
        },
        "faults": len(tally.faults),
    }


def _high(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[-1] if len(values) > 1 else values[0]


def put_load(
    command: Sequence[str],
    backbone_name: str,
    *,
    seconds: float,
    prefixes: int,
    connections: int,
    tell: Callable[[str], None],
    length: int = 10,
    slots: int = 16,
    queue: int = 64,
) -> tuple[dict[str, Any], Tally]:
    """Start a server, put the load on it, stop it; the figures, and what happened.

    Args:
        command: What starts a server, without its options.
        backbone_name: As `prefixtune serve` takes it.
        seconds: How long the load lasts.
        prefixes: How many.
        connections: Of each tenant of one share.
        tell: Told how far it is.
        length: P of every prefix.
        slots: Texts that run at once.
        queue: Texts that may wait.
    """
    keys = {name: new_key() for name in (*TENANTS, "admin")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        backbone = load_backbone(backbone_name, dtype="float32", device="cpu")
        names = make_prefixes(backbone, folder / "prefixes", prefixes, length)
        known = write_all(backbone, folder / "prefixes", names)
        tell(f"{len(set(known.values()))} different texts of {len(known)}")
        server = Server(command, backbone_name, folder, keys, slots, queue)
        try:
            server.wait()
            tally = asyncio.run(Load(server, keys, known, seconds).run(connections))
        finally:
            code = server.stop()
        if code:
            tally.faults.append(f"the server ended with {code}")
        return summarize(tally, seconds), tally


def main() -> int:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--prefixes", type=int, default=200)
    parser.add_argument("--connections", type=int, default=32, help="of each tenant of one share")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "load.json")
    options = parser.parse_args()
    command = [str(Path(sys.executable).with_name("prefixtune")), "serve"]
    figures, tally = put_load(
        command,
        options.backbone,
        seconds=options.seconds,
        prefixes=options.prefixes,
        connections=options.connections,
        tell=lambda text: print(text, file=sys.stderr),
    )
    for fault in tally.faults[:20]:
        print(f"fault: {fault}", file=sys.stderr)
    asked = {name: getattr(options, name) for name in ("backbone", "seconds", "prefixes", "connections")}
    written = {"command": shlex.join(["python", *sys.argv]), **asked, **machine.describe(), "figures": figures}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
