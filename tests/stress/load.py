"""A mixed load on a real server on loopback: many prefixes, several tenants, all kinds of requests at once.

The text for each prefix is computed before with `generate`, and each response is compared with it: nobody may get
another's text or prefix. Three tenants send requests as fast as the server allows; one of them has six times the
connections of each of the others. Some requests are streamed, and some streams are left in the middle.

What must hold: no error but 429, no wrong text, and equal shares for tenants of equal rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2

from live_server import LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.server.auth import hash_key, new_key

TENANTS = {"heavy": 6, "light": 1, "other": 1}
"""Tenant -> connections, in units of `connections`."""
LENGTHS = (4, 8, 16)
SOURCES = ("name : Aromi | Type : pub", "name : The Vaults | area : riverside", "name : Blue Spice | food : Thai")
LONG = " | ".join(SOURCES * 4)


@dataclass
class Tally:
    """Counts of a load: correct responses, tokens and responses 429 by tenant, streams that were left, and faults."""

    done: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    left: int = 0
    faults: list[str] = field(default_factory=list)


def write_keys(path, **settings):
    """Write a server's configuration with a key for each tenant; returns the keys."""
    keys = {name: new_key() for name in TENANTS}
    rules = "".join(f'[keys.{name}]\nhash = "{hash_key(key)}"\n' for name, key in keys.items())
    path.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()) + rules, encoding="utf-8")
    return keys


def expected_texts(backbone, folder, names):
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


def put_load(folder, *, seconds, prefixes, connections):
    """Start a server over a tiny model, put the load on it, and stop it."""
    model, stored = make_model(folder / "tiny"), folder / "prefixes"
    stored.mkdir()
    backbone = load_backbone(str(model), dtype="float32", device="cpu")
    names = [f"p{index}" for index in range(prefixes)]
    for seed, name in enumerate(names):
        make_prefix(backbone, stored / f"{name}.safetensors", seed, task="records")
    keys = write_keys(folder / "serve.toml", num_slots=4, max_queue=300)
    server = LiveServer(model, stored, "--config", str(folder / "serve.toml"))
    try:
        server.wait()
        tally = asyncio.run(Load(server.url, keys, expected_texts(backbone, stored, names), seconds).run(connections))
    finally:
        code = server.stop()
    if code:
        tally.faults.append(f"the server ended with {code}")
    return tally


class Load:
    """All clients, until the time is over."""

    def __init__(self, url, keys, expected, seconds):
        self.url, self.keys, self.expected, self.end = url, keys, expected, time.monotonic() + seconds
        self.tally = Tally()

    async def run(self, connections):
        """Run all clients."""
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for tenant, share in TENANTS.items():
                headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
                limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
                client = httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=120, limits=limits)
                await stack.enter_async_context(client)
                clients += [self._send_requests(client, tenant, index) for index in range(share * connections)]
            await asyncio.gather(*clients)
        return self.tally

    async def _send_requests(self, client, tenant, index):
        """One connection: request after request."""
        draw = random.Random(f"{tenant}/{index}")
        while time.monotonic() < self.end:
            name, prompt = draw.choice(list(self.expected))
            body = {"model": name, "prompt": prompt, "max_tokens": draw.choice(LENGTHS), "temperature": 0}
            kind = draw.choices(("whole", "two", "stream", "leave"), weights=(6, 2, 6, 1))[0]
            try:
                if kind in ("whole", "two"):
                    pause = await self._whole(client, tenant, {**body, "n": 1 + (kind == "two")})
                else:
                    pause = await self._stream(client, tenant, body, leave=kind == "leave")
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                self.tally.faults.append(f"{kind} of {name}: {type(error).__name__}: {error}")
                pause = 0.0
            await asyncio.sleep(pause)

    def _pause(self, response, tenant):
        """Seconds to wait if the server is busy; 0: it responded."""
        if response.status_code == 429:
            self.tally.busy[tenant] += 1
            return min(2.0, float(response.headers["retry-after"]))
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        return 0.0

    def _check(self, body, text):
        expected = self.expected[body["model"], body["prompt"]]
        if not expected.startswith(text) or not text:
            self.tally.faults.append(f"{body['model']} says {text!r}, but alone {expected!r}")

    def _count(self, tenant, tokens):
        self.tally.done[tenant] += 1
        # Requests that still wait at the end are mostly those of the tenant with most connections.
        if time.monotonic() < self.end:
            self.tally.tokens[tenant] += tokens

    async def _whole(self, client, tenant, body):
        response = await client.post("/v1/completions", json=body)
        pause = self._pause(response, tenant)
        if not pause:
            for choice in response.json()["choices"]:
                self._check(body, choice["text"])
            self._count(tenant, response.json()["usage"]["completion_tokens"])
        return pause

    async def _stream(self, client, tenant, body, *, leave):
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        text, tokens = "", 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            pause = self._pause(response, tenant)
            if pause:
                return pause
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ValueError(f"the stream ended with {event['error']}")
                text += "".join(choice["text"] for choice in event["choices"])
                if leave and text:
                    self.tally.left += 1
                    return 0.0
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        self._check(body, text)
        self._count(tenant, tokens)
        return 0.0
