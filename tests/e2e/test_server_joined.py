"""200 random mixes of prefixes at once to a real server: each is answered as `generate` does with the composed file.

Mixes differ in their parts, order and lengths; requests in endpoint, streaming, number of texts and in how they name
the parts. Requests for single prefixes run beside them in the same batch.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.inference.generate import generate
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.compose import concatenate

SEED, MIXES, SINGLES, CLIENTS, SECONDS = 7, 200, 40, 16, 120
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}"}
LENGTHS = {"manual": 27, "user-42": 12, "style": 1, "faq": 40, "v2.notes": 18, "tone": 9}
WORDS = (
    "pub",
    "cafe",
    "river",
    "centre",
    "cheap",
    "dear",
    "children",
    "Aromi",
    "Vaults",
    "5",
    "é",
    "中",
    "near",
    "the",
)


@dataclass(frozen=True)
class Mix:
    """One request.

    Attributes:
        parts: Names of the prefixes, in order.
        source: What they read.
        length: Of each text, in tokens.
        kind: `completion`, `chat` or `task`.
        listed: Whether the parts are in `prefixes`, not in the model's name.
        n: Texts.
        stream: Whether they come in pieces.
    """

    parts: tuple[str, ...]
    source: str
    length: int
    kind: str
    listed: bool
    n: int
    stream: bool

    @property
    def name(self) -> str:
        return "+".join(self.parts)

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        body: dict[str, Any] = {"max_tokens": self.length, "stream": self.stream}
        if self.kind == "task":
            return f"/v1/tasks/{self.name}", {**body, "name": self.source}
        body |= {"temperature": 0, "n": self.n}
        body |= {"prefixes": list(self.parts)} if self.listed else {"model": self.name}
        if self.kind == "chat":
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": self.source}]}
        return "/v1/completions", {**body, "prompt": self.source}


def draw_mix(draw: random.Random, most: int) -> Mix:
    kind = draw.choice(("completion", "completion", "chat", "task"))
    return Mix(
        parts=tuple(draw.sample(list(LENGTHS), draw.randint(min(2, most), most))),
        source=" ".join(draw.choices(WORDS, k=draw.randint(1, 30))),
        length=draw.choice((1, 4, 9, 16)),
        kind=kind,
        listed=draw.random() < 0.5,
        n=1 if kind == "task" else draw.choice((1, 1, 3)),
        stream=draw.random() < 0.5,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    (folder / "prefixes").mkdir()
    backbone = load_backbone(make_model(folder / MODEL), dtype="float32", device="cpu")
    for seed, (name, length) in enumerate(LENGTHS.items()):
        path = folder / "prefixes" / f"{name}.safetensors"
        make_prefix(backbone, path, seed, length=length, task="records", text_format=FORMAT)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    # A memory that does not hold all joins, so that some are computed again.
    server = LiveServer(folder / MODEL, folder / "prefixes", "--cache-mib", "1", "--num-slots", "8").wait()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.errors)
    assert not [line for line in server.lines if line["level"] == "error"]


@pytest.fixture(scope="module")
def mixes() -> list[Mix]:
    draw = random.Random(SEED)
    mixes = [draw_mix(draw, 4) for _ in range(MIXES)] + [draw_mix(draw, 1) for _ in range(SINGLES)]
    draw.shuffle(mixes)
    return mixes


@pytest.fixture(scope="module")
def expected(folder: Path, mixes: list[Mix]) -> list[str]:
    """What `generate` writes with the composed file of each mix."""
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    parts = {name: load_prefix(folder / "prefixes" / f"{name}.safetensors", backbone) for name in LENGTHS}
    composed = {}
    for name in {mix.name for mix in mixes}:
        joined = [parts[part] for part in name.split("+")]
        one = joined[0] if len(joined) == 1 else concatenate(joined, backbone.rotation)
        composed[name] = load_prefix(save_prefix(folder / "composed" / f"{name}.safetensors", one), backbone)
        assert composed[name].length() == sum(LENGTHS[part] for part in name.split("+"))
    texts = [""] * len(mixes)
    for length in {mix.length for mix in mixes}:
        chosen = [index for index, mix in enumerate(mixes) if mix.length == length]
        sources, prefixes = [mixes[i].source for i in chosen], [composed[mixes[i].name] for i in chosen]
        written = generate(backbone, sources, prefixes, max_new_tokens=length, ban_newlines=False)
        for index, text in zip(chosen, written, strict=True):
            texts[index] = text
    return texts


async def write(client: httpx2.AsyncClient, mix: Mix) -> list[str]:
    """The texts of a request, whole or put together from a stream."""
    path, body = mix.request()
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    if not mix.stream:
        answer = response.json()
        assert answer["model"] == mix.name
        if mix.kind == "task":
            return [answer["output"]]
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert {event["model"] for event in events} == {mix.name}
    if mix.kind == "task":
        return [str(events[-1]["output"])]
    texts = [""] * mix.n
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] += piece
    return texts


async def write_all(server: LiveServer, mixes: list[Mix]) -> list[list[str]]:
    texts: list[list[str]] = [[] for _ in mixes]
    waiting = iter(enumerate(mixes))

    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:

        async def send_next() -> None:
            for index, mix in waiting:
                texts[index] = await write(client, mix)

        await asyncio.wait_for(asyncio.gather(*(send_next() for _ in range(CLIENTS))), SECONDS)
    return texts


def test_joined_requests_are_those_of_the_composed_file(
    server: LiveServer, mixes: list[Mix], expected: list[str]
) -> None:
    written = asyncio.run(write_all(server, mixes))
    for mix, texts, text in zip(mixes, written, expected, strict=True):
        assert texts == [text] * mix.n, mix
    # The requests were as mixed as they should be, and parts make a difference.
    assert len({mix.name for mix in mixes}) > 100
    assert len(set(expected)) > 150
    assert server.metric("prefixtune_prefix_cache_evictions_total") > 0
    for part in LENGTHS:
        count = sum(mix.n for mix in mixes if part in mix.parts)
        assert server.metric("prefixtune_texts_total", prefix=part) == count
