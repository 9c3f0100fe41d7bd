"""Limits: of the queue, of a key, and of an address."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from asgi_client import Response, bearer, completion, send
from prefixtune.server.api import prompting
from prefixtune.server.auth import hash_key
from prefixtune.server.limits import Admission, QueueFull, RateLimited, RequestLimit
from prefixtune.server.settings import KeyConfig


def test_the_queue_is_bounded(make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make_server(max_queue=2)
    monkeypatch.setattr(state.worker, "submit", lambda *_, **__: None)

    async def fill() -> tuple[Response, Response]:
        disconnected = asyncio.Event()
        running = [
            asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(n=3), disconnected=disconnected))
            for _ in range(2)
        ]
        while state.admission.texts < 6:
            await asyncio.sleep(0.005)
        refused = await send(app, "POST", "/v1/completions", completion())
        health = await send(app, "GET", "/healthz")
        disconnected.set()
        await asyncio.gather(*running)
        return refused, health

    refused, health = asyncio.run(fill())
    assert (refused.status, refused.code) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert health.status == 200
    assert state.admission.texts == 0


def test_requests_in_preparation_are_bounded(make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = make_server(max_queue=2)
    release = threading.Event()
    encode = prompting.encode_prompts

    def slowly(*arguments: Any) -> Any:
        assert release.wait(20)
        return encode(*arguments)

    monkeypatch.setattr(prompting, "encode_prompts", slowly)
    chat = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "n": 2}
    task = {"name": "Aromi", "max_tokens": 5}

    async def fill() -> tuple[list[Response], list[Response]]:
        bodies = [("/v1/completions", completion(prompt=["x", "y"])), ("/v1/chat/completions", chat)]
        bodies += [("/v1/tasks/b", task), ("/v1/tasks/a", task)]
        running = [asyncio.ensure_future(send(app, "POST", path, body)) for path, body in bodies]
        while state.admission.texts_in_preparation < 6:
            await asyncio.sleep(0.005)
        refused = [await send(app, "POST", path, body) for path, body in bodies]
        release.set()
        return refused, list(await asyncio.gather(*running))

    refused, served = asyncio.run(fill())
    assert [(response.status, response.code) for response in refused] == [(429, "queue_full")] * 4
    assert {response.headers["retry-after"] for response in refused} == {"1"}
    assert [response.status for response in served] == [200] * 4
    assert state.admission.texts_in_preparation == 0
    # What is refused later counts no more, either.
    assert asyncio.run(send(app, "POST", "/v1/completions", completion(prompt="x" * 2_000))).status == 400
    assert state.admission.texts_in_preparation == 0


def test_what_can_never_fit_is_refused_as_such_before_the_queue(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server(max_queue=1)
    submitted: list[Any] = []
    monkeypatch.setattr(state.worker, "submit", lambda request, *_, **__: submitted.append(request))

    async def fill() -> list[Response]:
        disconnected = asyncio.Event()
        size = state.admission.num_slots + 1
        running = [
            asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(), disconnected=disconnected))
            for _ in range(size)
        ]
        while state.admission.texts < size:
            await asyncio.sleep(0.005)
        too_long = completion(max_tokens=state.engine.max_length)
        second_too_long = completion(prompt=["a", "a" * 2_000])
        answers = [
            await send(app, "POST", "/v1/completions", body) for body in (completion(), too_long, second_too_long)
        ]
        disconnected.set()
        await asyncio.gather(*running)
        return answers

    full, *refused = asyncio.run(fill())
    assert (full.status, full.code) == (429, "queue_full")
    assert [(answer.status, answer.code) for answer in refused] == [(400, "context_length_exceeded")] * 2
    assert len(submitted) == state.admission.num_slots + 1


def test_a_queue_that_one_tenant_has_filled_is_open_to_the_others() -> None:
    admission = Admission(num_slots=2, max_queue=8)

    def enter(tenant: str, texts: int = 1) -> bool:
        try:
            stack.enter_context(admission.admit(texts, tenant))
        except QueueFull:
            return False
        return True

    with contextlib.ExitStack() as stack:
        assert [enter("heavy") for _ in range(11)] == [True] * 10 + [False]
        # With two tenants each may hold half of the queue, with three a third.
        assert [enter("light") for _ in range(6)] == [True] * 5 + [False]
        assert [enter("late") for _ in range(4)] == [True] * 3 + [False]
        assert not enter("heavy")
        assert not enter("new", texts=4)
        assert admission.texts == 18
    assert admission.texts == 0
    with contextlib.ExitStack() as stack:
        assert enter("light", texts=10)


def test_requests_per_minute() -> None:
    now = [0.0]
    limit = RequestLimit("a", per_minute=3, clock=lambda: now[0])

    def request_once() -> None:
        with limit.request():
            pass

    for _ in range(3):
        request_once()
    with pytest.raises(RateLimited) as caught:
        request_once()
    assert caught.value.reason == "rate"
    assert caught.value.retry_after == 20
    # A third of a minute later there is room for exactly one.
    now[0] = 20.0
    request_once()
    with pytest.raises(RateLimited):
        request_once()
    # A long pause saves up no more than one minute.
    now[0] = 10_000.0
    for _ in range(3):
        request_once()
    with pytest.raises(RateLimited):
        request_once()


def test_concurrent_requests_are_counted_down_whatever_happens() -> None:
    limit = RequestLimit("a", concurrent=2)
    with limit.request(), limit.request():
        with pytest.raises(RateLimited) as caught, limit.request():
            pass
        assert caught.value.reason == "concurrency"
    with pytest.raises(OSError, match="gone"), limit.request():
        raise OSError("gone")
    with limit.request(), limit.request():
        pass


def test_concurrent_requests_are_counted_by_the_address_from_a_trusted_proxy(make_server: Callable[..., Any]) -> None:
    keys = {"me": KeyConfig(hash=hash_key("pt-me"))}
    app, _ = make_server(keys=keys, proxies=("10.0.0.1",), max_connections_per_address=2)

    async def several() -> list[Response]:
        def one(client: str) -> Awaitable[Response]:
            headers = {"x-forwarded-for": "192.0.2.7", **bearer("me")}
            return send(app, "POST", "/v1/completions", completion(), headers=headers, client=client)

        # Three at once of one address behind the proxy are one too many. Headers of others do not count.
        return list(await asyncio.gather(*(one("10.0.0.1") for _ in range(3)), *(one("10.0.0.2") for _ in range(3))))

    responses = asyncio.run(several())
    assert sorted(response.status for response in responses[:3]) == [200, 200, 429]
    assert next(response.code for response in responses if response.status == 429) == "address_limit_exceeded"
    assert {response.status for response in responses[3:]} == {200}
