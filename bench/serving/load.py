"""Put a mixed load on a real server on loopback: many prefixes, several tenants, all kinds of requests at once.

    python -m bench.serving.load                              # five minutes, 200 prefixes
    python -m bench.serving.load --seconds 20 --prefixes 30   # only to see that it works

The server runs in a process of its own (`prefixtune serve`, float32, so that a text is the same alone and in any mix).
The text for each prefix is computed before with `generate`, and each response is compared with it: nobody may get
another's text or prefix. Three tenants send requests as fast as the server allows; one of them has six times the
connections of each of the others. The requests: completions of several lengths, whole and streamed, tasks, long
prompts, two texts at once, streams that the client leaves in the middle; and an administrator replaces prefixes.

What must hold: no error but 429, no wrong text, memory that does not grow after the first half, and equal shares for
tenants of equal rights, however many connections they have.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import torch

from bench.machine import BackgroundLoad
from bench.results import FOLDER, Log, write_results
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.auth import hash_key, new_key
from prefixtune.training.starts.words import from_words

TENANTS = {"heavy": 6, "light": 1, "other": 1}
"""Tenant -> connections, in units of `--connections`."""
LENGTHS = (4, 8, 16)
SOURCES = ("name : Aromi | Type : pub", "name : The Vaults | area : riverside", "name : Blue Spice | food : Thai")
LONG = " | ".join(SOURCES * 4)


@dataclass
class Tally:
    """Counts and times of a load.

    Attributes:
        done: Tenant -> correct responses.
        tokens: Tenant -> tokens received.
        busy: Tenant -> responses 429.
        left: Streams that the client left.
        replaced: Prefixes that were uploaded again.
        seconds: Kind of request -> seconds of each.
        first: Seconds to the first chunk of each stream.
        faults: Errors and wrong texts, in words.
        memory: Seconds since the start, and MiB of the server.
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
        self,
        command: Sequence[str],
        backbone: str,
        folder: Path,
        keys: dict[str, str],
        slots: int,
        queue: int,
        dtype: str = "float32",
    ) -> None:
        rules = "".join(
            f'[keys.{name}]\nhash = "{hash_key(key)}"\n{"admin = true" if name == "admin" else ""}\n'
            for name, key in keys.items()
        )
        config = folder / "serve.toml"
        config.write_text(f"num_slots = {slots}\nmax_queue = {queue}\n{rules}", encoding="utf-8")
        self.log = open(folder / "server.log", "w+", encoding="utf-8")  # noqa: SIM115
        options = ["--prefixes", str(folder / "prefixes"), "--config", str(config), "--dtype", dtype, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--backbone", backbone, *options], stdout=self.log, stderr=subprocess.STDOUT
        )
        self.url = ""

    def wait(self, seconds: float = 120) -> None:
        """Wait until it is ready.

        Raises:
            SystemExit: It did not start; with its log.
        """
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
        """Stop it; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.log.close()
        return code


def add_noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor plus noise of 0.3 times its standard deviation."""
    return tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)


def make_prefixes(backbone: Backbone, folder: Path, count: int, length: int) -> list[str]:
    """Prefixes with different texts: keys and values of the same words, plus random noise; returns their names."""
    folder.mkdir()
    start = from_words(backbone, "Describe the restaurant in one sentence:", length)
    names = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        layers = {
            site: tuple((add_noise(key, generator), add_noise(value, generator)) for key, value in pairs)
            for site, pairs in start.layers.items()
        }
        names.append(f"p{index}")
        save_prefix(folder / f"p{index}.safetensors", Prefix(layers, make_header(backbone, task="records")))
    return names


def expected_texts(backbone: Backbone, folder: Path, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """(Prefix, prompt) -> the greedy text, for a short and a long prompt of each prefix."""
    pairs = [(name, prompt) for index, name in enumerate(names) for prompt in (SOURCES[index % len(SOURCES)], LONG)]
    prefixes = {name: load_prefix(folder / f"{name}.safetensors", backbone) for name in names}
    prompts = [backbone.encode(prompt) for _, prompt in pairs]
    config = GenerateConfig(max_new_tokens=max(LENGTHS), batch_size=32)
    outputs = generate_ids(backbone, prompts, [prefixes[name] for name, _ in pairs], config=config)
    texts = {}
    for pair, prompt, ids in zip(pairs, prompts, outputs, strict=True):
        # Decoded after the prompt's last tokens: alone, a first word may lose its space.
        texts[pair] = backbone.decode([*prompt[-4:], *ids])[len(backbone.decode(prompt[-4:])) :]
    return texts


class Load:
    """The clients.

    Args:
        server: The server under load.
        keys: Tenant -> key.
        expected: (Prefix, prompt) -> its text.
        seconds: Duration of the load.
    """

    def __init__(
        self, server: Server, keys: dict[str, str], expected: dict[tuple[str, str], str], seconds: float
    ) -> None:
        self.server, self.keys, self.expected, self.seconds = server, keys, expected, seconds
        self.names = sorted({name for name, _ in expected})
        self.tally = Tally()
        self.limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)

    async def run(self, connections: int) -> Tally:
        """Run all clients until the time is over."""
        self.started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Awaitable[None]] = [self._record_memory(), self._replace_prefixes()]
            for tenant, share in TENANTS.items():
                client = await stack.enter_async_context(self._client(tenant))
                clients += [self._send_requests(client, tenant, index) for index in range(share * connections)]
            await asyncio.gather(*clients)
        return self.tally

    @property
    def time_is_left(self) -> bool:
        """Whether clients go on."""
        return time.monotonic() - self.started < self.seconds

    def _client(self, tenant: str) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx2.AsyncClient(base_url=self.server.url, headers=headers, timeout=120, limits=self.limits)

    def _body(self, name: str, prompt: str, length: int, **more: Any) -> dict[str, Any]:
        return {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 0, **more}

    async def _send_requests(self, client: httpx2.AsyncClient, tenant: str, index: int) -> None:
        """One connection: request after request."""
        draw = random.Random(f"{tenant}/{index}")
        kinds = (self._whole, self._streamed, self._task, self._two, self._leave)
        while self.time_is_left:
            kind = draw.choices(kinds, weights=(6, 6, 3, 2, 1))[0]
            name, prompt = draw.choice(list(self.expected))
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

    def _pause(self, response: httpx2.Response, tenant: str) -> float:
        """Seconds to wait if the server is busy; 0: it responded.

        Raises:
            ValueError: The status is another error.
        """
        if response.status_code == 429:
            self.tally.busy[tenant] += 1
            return min(2.0, float(response.headers["retry-after"]))
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        return 0.0

    def _check(self, name: str, prompt: str, text: str, what: str) -> None:
        expected = self.expected[name, prompt]
        if not expected.startswith(text) or not text:
            self.tally.faults.append(f"{what} of {name} is {text!r}, but alone it is {expected!r}")

    async def _whole(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        response = await client.post("/v1/completions", json=self._body(name, prompt, length))
        pause = self._pause(response, tenant)
        if not pause:
            self._check(name, prompt, response.json()["choices"][0]["text"], "completion")
            self._count(tenant, response.json()["usage"]["completion_tokens"])
        return pause

    async def _two(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        response = await client.post("/v1/completions", json=self._body(name, prompt, length, n=2))
        pause = self._pause(response, tenant)
        if not pause:
            for choice in response.json()["choices"]:
                self._check(name, prompt, choice["text"], "completion of two")
            self._count(tenant, response.json()["usage"]["completion_tokens"])
        return pause

    async def _task(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        body = {"source": prompt, "max_tokens": length, "temperature": 0}
        response = await client.post(f"/v1/tasks/{name}", json=body)
        pause = self._pause(response, tenant)
        if not pause:
            self._count(tenant, response.json()["usage"]["completion_tokens"])
        return pause

    async def _streamed(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        return await self._stream(client, tenant, name, prompt, length, leave=False)

    async def _leave(self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int) -> float:
        return await self._stream(client, tenant, name, prompt, max(LENGTHS), leave=True)

    async def _stream(
        self, client: httpx2.AsyncClient, tenant: str, name: str, prompt: str, length: int, *, leave: bool
    ) -> float:
        body = self._body(name, prompt, length, stream=True, stream_options={"include_usage": True})
        began, text, first = time.monotonic(), "", True
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            pause = self._pause(response, tenant)
            if pause:
                return pause
            async for event in _events(response):
                if event["choices"]:
                    text += event["choices"][0]["text"]
                    if first:
                        self.tally.first.append(time.monotonic() - began)
                    first = False
                if leave and text:
                    self.tally.left += 1
                    return 0.0
                if event.get("usage"):
                    self._count(tenant, event["usage"]["completion_tokens"])
        self._check(name, prompt, text, "stream")
        return 0.0

    def _count(self, tenant: str, tokens: int) -> None:
        self.tally.done[tenant] += 1
        # Requests that still wait at the end are mostly those of the tenant with most connections, without competition.
        if self.time_is_left:
            self.tally.tokens[tenant] += tokens

    async def _replace_prefixes(self) -> None:
        """Replace prefixes by the same files: running and new requests get the same texts."""
        draw, folder = random.Random("admin"), Path(self.server.log.name).parent / "prefixes"
        async with self._client("admin") as client:
            while self.time_is_left:
                name = draw.choice(self.names)
                response = await client.put(
                    f"/admin/prefixes/{name}",
                    content=(folder / f"{name}.safetensors").read_bytes(),
                    headers={"Content-Type": "application/octet-stream"},
                )
                if response.status_code not in (200, 201):
                    self.tally.faults.append(f"upload of {name}: status {response.status_code}")
                self.tally.replaced += 1
                await asyncio.sleep(1)

    async def _record_memory(self) -> None:
        while self.time_is_left:
            self.tally.memory.append((time.monotonic() - self.started, self.server.memory()))
            await asyncio.sleep(min(1.0, self.seconds / 20))


async def _events(response: httpx2.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
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
            kind: {"median": round(median(values), 3), "p99": round(_p99(values), 3)}
            for kind, values in sorted(tally.seconds.items())
        },
        "first_piece": {"median": round(median(tally.first), 3), "p99": round(_p99(tally.first), 3)},
        "memory_mib": {
            "start": round(tally.memory[0][1]),
            "half": round(half[0]),
            "end": round(half[-1]),
            "most": round(max(mib for _, mib in tally.memory)),
        },
        "faults": len(tally.faults),
    }


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[-1] if len(values) > 1 else values[0]


def run_load(
    command: Sequence[str],
    backbone_name: str,
    *,
    seconds: float,
    prefixes: int,
    connections: int,
    log: Log,
    length: int = 10,
    slots: int = 16,
    queue: int = 64,
) -> tuple[dict[str, Any], Tally]:
    """Start a server, put the load on it, stop it; returns the figures and the tally.

    Args:
        command: Starts a server, without its options.
        backbone_name: As for `prefixtune serve`.
        seconds: Duration of the load.
        prefixes: Number of prefixes.
        connections: Connections of each tenant with one share.
        log: Shows the progress.
        length: P of every prefix.
        slots: Texts that run at once.
        queue: Most texts that may wait.
    """
    keys = {name: new_key() for name in (*TENANTS, "admin")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = load_backbone(backbone_name, dtype="float32", device="cpu")
        names = make_prefixes(backbone, folder / "prefixes", prefixes, length)
        expected = expected_texts(backbone, folder / "prefixes", names)
        log(f"{len(set(expected.values()))} different texts of {len(expected)}")
        server = Server(command, backbone_name, folder, keys, slots, queue)
        try:
            server.wait()
            tally = asyncio.run(Load(server, keys, expected, seconds).run(connections))
        finally:
            code = server.stop()
        if code:
            tally.faults.append(f"the server ended with {code}")
        return summarize(tally, seconds), tally


def main() -> int:
    """Measure, print, and write the figures; the exit code is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--prefixes", type=int, default=200)
    parser.add_argument("--connections", type=int, default=32, help="of each tenant with one share")
    parser.add_argument("--json", type=Path, default=FOLDER / "load.json")
    options = parser.parse_args()
    command, background = [sys.executable, "-m", "prefixtune", "serve"], BackgroundLoad()
    figures, tally = run_load(
        command,
        options.backbone,
        seconds=options.seconds,
        prefixes=options.prefixes,
        connections=options.connections,
        log=lambda text: print(text, file=sys.stderr),
    )
    for fault in tally.faults[:20]:
        print(f"fault: {fault}", file=sys.stderr)
    settings = {name: getattr(options, name) for name in ("backbone", "seconds", "prefixes", "connections")}
    write_results(options.json, background, {**settings, "figures": figures})
    print(json.dumps(figures, indent=1))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
