"""600 random requests at once to a real server: each is answered as `generate` answers its text by itself.

Requests differ in length, prefix, sampling, stops, number of texts, endpoint and streaming; some clients disconnect in
the middle, some requests are wrong. What is sampled from a seed is compared with the engine that has nothing else to do
(the engine promises the same text in any company, and draws otherwise than `generate`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.server.auth import hash_key
from random_requests import (
    DEFAULT_LENGTH,
    LONGEST,
    PREFIXES,
    ROUTES,
    TENANTS,
    Case,
    Reference,
    body_of,
    draw_case,
    draw_source,
    with_stop,
)

SEED, REQUESTS, HALVES, CLIENTS, SECONDS = 15, 600, 12, 24, 90
SLOTS, QUEUE = 8, 120


@dataclass
class Reply:
    """What a client received.

    Attributes:
        status: Of HTTP; 0: it left before.
        code: Of an error.
        texts: By index.
        reasons: Why each text ended, by index.
        usage: Tokens, if they were reported.
        complete: Whether the client stayed to the end.
    """

    status: int = 0
    code: str | None = None
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    complete: bool = False


USER = [{"role": "user", "content": "a"}]
WRONG: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("completion", {"model": "pubs", "prompt": "a", "max_token": 3}, 400, "unknown_field"),
    ("completion", {"model": "pubs", "prompt": "a", "temperature": 3}, 400, None),
    ("completion", {"model": "nobody", "prompt": "a"}, 404, "model_not_found"),
    ("completion", {"model": "pubs", "prompt": "a" * 600}, 400, "context_length_exceeded"),
    ("completion", {"model": MODEL, "prompt": [1, 2, 99_999]}, 400, None),
    ("completion", {"model": MODEL, "prompt": "a", "max_tokens": LONGEST + 1, "stream": True}, 400, None),
    ("chat", {"model": "pubs", "messages": []}, 400, None),
    ("chat", {"model": "pubs", "messages": USER * 2}, 400, "messages_not_carried"),
    ("chat", {"model": MODEL, "messages": [{"role": "assistant", "content": "a"}], "stream": True}, 400, None),
    ("chat", {"model": "plain", "messages": USER, "tools": [{"type": "function"}]}, 400, "unsupported_field"),
    ("task", {"name": "Aromi", "stream": True}, 400, None),
    ("task", {"name": "Aromi", "food": "soup", "foood": "soup"}, 400, "unknown_field"),
]


# --- the clients ------------------------------------------------------------------------------------------------------


async def replay(client: httpx2.AsyncClient, case: Case, body: dict[str, Any]) -> Reply:
    """Send a request, and read its response as far as the client stays."""
    headers = {"Authorization": f"Bearer pt-{case.tenant}"}
    reply = Reply()
    if not case.stream:
        seconds = None if case.leaves is None else (case.leaves + 1) / 100
        with contextlib.suppress(TimeoutError):
            response = await asyncio.wait_for(client.post(case.path, json=body, headers=headers), seconds)
            read_whole(reply, response.status_code, response.json())
        return reply
    async with client.stream("POST", case.path, json=body, headers=headers) as response:
        reply.status = response.status_code
        if response.status_code != 200:
            read_whole(reply, response.status_code, json.loads(await response.aread()))
            return reply
        count = 0
        async for event in events_of(response):
            if case.leaves is not None and count >= case.leaves:
                return reply
            count += 1
            if event is None:
                reply.complete = True
            else:
                read_event(reply, event)
    return reply


async def events_of(response: httpx2.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The events of a stream; None: its regular end."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            yield None
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def read_whole(reply: Reply, status: int, answer: dict[str, Any]) -> None:
    reply.status, reply.complete = status, True
    if status != 200:
        reply.code = answer["error"]["code"]
        return
    reply.usage = answer["usage"]
    for choice in answer.get("choices", [{**answer, "index": 0}]):
        text = choice["message"]["content"] if "message" in choice else choice.get("text", choice.get("output"))
        reply.texts[choice["index"]], reply.reasons[choice["index"]] = text, choice["finish_reason"]


def read_event(reply: Reply, event: dict[str, Any]) -> None:
    assert "error" not in event, event
    reply.usage = event.get("usage") or reply.usage
    if event["object"] == "task.output":
        # The last event of a task has the whole output again.
        assert event["output"].startswith(reply.texts.get(0, ""))
        reply.texts[0], reply.reasons[0] = event["output"], event["finish_reason"]
        return
    for choice in event.get("choices", [{**event, "index": 0}]):
        delta = choice.get("text", choice.get("delta"))
        piece = (delta.get("content") or "") if isinstance(delta, dict) else delta
        index = choice["index"]
        assert index not in reply.reasons, "a piece after the end"
        reply.texts[index] = reply.texts.get(index, "") + piece
        if choice.get("finish_reason"):
            reply.reasons[index] = choice["finish_reason"]


async def send_half(server: LiveServer, seconds: float) -> None:
    """Disconnect in the middle of a body."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer pt-alice\r\nContent-Length: 400\r\n"
    writer.write(f'{head}Content-Type: application/json\r\n\r\n{{"model": "pubs", "prompt": "'.encode())
    await writer.drain()
    await asyncio.sleep(seconds)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


# --- what is checked --------------------------------------------------------------------------------------------------


def check_reply(reply: Reply, case: Case, texts: list[str]) -> None:
    """The texts are right, as far as the client stayed."""
    assert reply.code is None, case
    if not reply.complete:
        assert case.leaves is not None, case
        assert all(texts[index].startswith(text) for index, text in reply.texts.items()), case
        return
    assert reply.status == 200
    assert [reply.texts.get(index, "") for index in range(len(texts))] == texts, case
    assert len(reply.reasons) == len(texts)
    assert set(reply.reasons.values()) <= {"stop", "length"}
    most = len(texts) * case.rules()["max_new_tokens"]
    if reply.usage is not None and set(reply.reasons.values()) == {"length"}:
        assert reply.usage["completion_tokens"] == most
    assert reply.usage is None or reply.usage["completion_tokens"] <= most


def is_idle(server: LiveServer, open_files: float) -> bool:
    """Whether no text runs or waits, and no connection is open but the one that asks."""
    status = server.get("/v1/status", key="pt-admin")[1]
    return (
        (status["running"], status["waiting"]) == ([], 0)
        and server.metric("prefixtune_open_requests", key="pt-admin") == 1
        and server.metric("process_open_fds", key="pt-admin") <= open_files
    )


def check_metrics(server: LiveServer, replies: Sequence[Reply], cases: Sequence[tuple[Case, list[str]]]) -> None:
    """Every request and every text is counted once."""

    def total(name: str, **labels: str) -> float:
        return server.metric(f"prefixtune_{name}", key="pt-admin", **labels)

    routes = tuple(ROUTES.values())
    # A client may have left before its header was sent.
    sent = REQUESTS - sum(not reply.status for reply in replies)
    assert sent <= sum(total("requests_total", route=route) for route in routes) <= REQUESTS
    refused = [total("requests_total", route=route, status=str(status)) for route in routes for status in (400, 404)]
    assert sum(refused) == 3 * len(WRONG)
    complete = sum(len(texts) for reply, (_, texts) in zip(replies, cases, strict=True) if reply.complete)
    everything = sum(len(texts) for _, texts in cases)
    ended = {reason: total("texts_total", finished=reason) for reason in ("stop", "length", "gone")}
    assert complete <= ended["stop"] + ended["length"] <= sum(ended.values()) <= everything
    assert total("texts_total") == sum(ended.values()), "no text ended in another way"
    assert total("new_tokens_total") >= sum(reply.usage["completion_tokens"] for reply in replies if reply.usage)
    assert (total("engine_restarts_total"), total("running_texts"), total("waiting_texts")) == (0, 0, 0)
    assert total("rejected_total", reason="queue_full") == 0


def check_room(server: LiveServer) -> None:
    """All slots and the whole queue are free for one caller."""
    body = {"model": "pubs", "prompt": "x", "max_tokens": 1, "temperature": 0, "n": SLOTS + QUEUE}
    status, answer, _ = server.post("/v1/completions", body, key="pt-alice")
    assert status == 200, answer
    assert len(answer["choices"]) == SLOTS + QUEUE
    whole = json.dumps({**body, "n": 1}).encode().ljust(2**20)
    assert server.post("/v1/completions", whole, key="pt-bob")[0] == 200


# --- the test ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("replay")
    make_model(folder / MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    with torch.no_grad():
        # Some texts are to end by themselves.
        end = model.lm_head.weight[model.config.eos_token_id]
        end.copy_(1.6 * torch.randn(end.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder / MODEL)
    (folder / "prefixes").mkdir()
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    for seed, (name, facts) in enumerate(PREFIXES.items()):
        make_prefix(backbone, folder / "prefixes" / f"{name}.safetensors", seed, **facts)
    keys = "".join(f'[keys.{name}]\nhash = "{hash_key(f"pt-{name}")}"\n' for name in TENANTS)
    (folder / "serve.toml").write_text(
        f"num_slots = {SLOTS}\nmax_queue = {QUEUE}\nmax_texts = {SLOTS + QUEUE}\n"
        f"max_tokens = {LONGEST}\ndefault_max_tokens = {DEFAULT_LENGTH}\nprefill_tokens = 48\n"
        f'{keys}[keys.admin]\nhash = "{hash_key("pt-admin")}"\nadmin = true\n'
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml")).wait()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.errors)
    assert not [line for line in server.lines if line["level"] == "error"]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(load_backbone(folder / MODEL, dtype="float32", device="cpu"), folder / "prefixes")


@pytest.fixture(scope="module")
def cases(reference: Reference) -> list[tuple[Case, list[str]]]:
    """The requests that are answered, and their texts."""
    draw = random.Random(SEED)
    sources = [draw_source(draw) for _ in range(80)]
    drawn = [draw_case(draw, sources) for _ in range(REQUESTS - 3 * len(WRONG) - HALVES)]
    texts = reference.texts(drawn)
    cases = [
        with_stop(case, written, draw) if draw.random() < 0.3 else case
        for case, written in zip(drawn, texts, strict=True)
    ]
    changed = [index for index, (case, old) in enumerate(zip(cases, drawn, strict=True)) if case != old]
    for index, written in zip(changed, reference.texts([cases[index] for index in changed]), strict=True):
        texts[index] = written
    return list(zip(cases, texts, strict=True))


async def replay_all(server: LiveServer, cases: list[tuple[Case, list[str]]], backbone: Any) -> list[Reply]:
    """Send all cases in their order by some clients at once, and wrong requests and halves of requests between them."""
    draw, replies = random.Random(SEED), [Reply() for _ in cases]
    limits = httpx2.Limits(max_connections=None)

    async def answer(index: int) -> None:
        replies[index] = await replay(client, cases[index][0], body_of(cases[index][0], backbone))

    async def refuse(endpoint: str, body: dict[str, Any], status: int, code: str | None) -> None:
        path = ROUTES[endpoint].format(name="mine")
        response = await client.post(path, json=body, headers={"Authorization": f"Bearer pt-{draw.choice(TENANTS)}"})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text

    async with httpx2.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
        work = [functools.partial(answer, index) for index in range(len(cases))]
        for other in [
            *(functools.partial(refuse, *wrong) for wrong in WRONG * 3),
            *[functools.partial(send_half, server, 0.01)] * HALVES,
        ]:
            work.insert(draw.randrange(len(work)), other)
        assert len(work) == REQUESTS
        waiting = iter(work)

        async def send_next() -> None:
            for one in waiting:
                await one()

        await asyncio.wait_for(asyncio.gather(*(send_next() for _ in range(CLIENTS))), SECONDS)
    return replies


def test_the_texts_are_those_of_generate_and_nothing_is_left(
    server: LiveServer, reference: Reference, cases: list[tuple[Case, list[str]]]
) -> None:
    before = server.metric("process_open_fds", key="pt-admin")
    replies = asyncio.run(replay_all(server, cases, reference.backbone))
    tally = Counter[str]()
    for reply, (case, texts) in zip(replies, cases, strict=True):
        check_reply(reply, case, texts)
        tally["complete" if reply.complete else "left"] += 1
        tally.update(f"ended by {reason}" for reason in reply.reasons.values())
    # The requests were as mixed as they should be.
    assert min(tally[name] for name in ("complete", "left", "ended by stop", "ended by length")) > 20, tally
    assert len({text for _, texts in cases for text in texts}) > len(cases) / 2
    server.until(lambda: is_idle(server, before))
    check_metrics(server, replies, cases)
    check_room(server)
