"""Health and status."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import Response, bearer, completion, send
from prefixtune.jobs.files import FileStore
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def test_while_draining_only_running_requests_go_on(make_server: Callable[..., Any]) -> None:
    app, state = make_server()

    async def drain() -> tuple[Response, Response, Response, Response, bool]:
        running = asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(max_tokens=100)))
        while not state.gate.count:
            await asyncio.sleep(0.005)
        draining = asyncio.ensure_future(state.drain(20))
        await asyncio.sleep(0)
        refused = await send(app, "POST", "/v1/completions", completion())
        alive, ready = await send(app, "GET", "/healthz"), await send(app, "GET", "/readyz")
        return await running, refused, alive, ready, await draining

    done, refused, alive, ready, in_time = asyncio.run(drain())
    assert (done.status, done.json["usage"]["completion_tokens"]) == (200, 100)
    assert (refused.status, refused.code) == (503, "draining")
    assert "retry-after" in refused.headers
    assert (alive.status, ready.status, in_time) == (200, 503, True)


def test_a_request_that_is_not_admitted_yet_goes_on_while_draining(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    begun, release = threading.Event(), threading.Event()

    def look_slowly(self: FileStore, *_: Any) -> list[Any]:
        begun.set()
        assert release.wait(20)
        return []

    monkeypatch.setattr(FileStore, "list", look_slowly)

    async def drain() -> tuple[bool, Response, bool]:
        running = asyncio.ensure_future(send(app, "GET", "/v1/files"))
        assert await asyncio.to_thread(begun.wait, 20)
        draining = asyncio.ensure_future(state.drain(20))
        await asyncio.sleep(0.05)
        waits = not draining.done()
        release.set()
        return waits, await running, await draining

    waits, response, in_time = asyncio.run(drain())
    assert (waits, response.status, in_time) == (True, 200, True)


def test_status_hides_the_names_of_other_callers_models(make_server: Callable[..., Any]) -> None:
    keys = {name: KeyConfig(hash=hash_key(f"pt-{name}"), prefixes=(name,)) for name in "ab"}
    app, state = make_server(keys=keys)

    async def look() -> list[Response]:
        disconnected = asyncio.Event()
        running = [
            asyncio.ensure_future(
                send(
                    app,
                    "POST",
                    "/v1/completions",
                    completion(model=name, max_tokens=500),
                    headers=bearer(name),
                    disconnected=disconnected,
                )
            )
            for name in "ab"
        ]
        while len(state.worker.snapshot().running) < 2:
            await asyncio.sleep(0.005)
        statuses = [await send(app, "GET", "/v1/status", headers=bearer(name)) for name in "ab"]
        disconnected.set()
        await asyncio.gather(*running)
        return statuses

    for name, response in zip("ab", asyncio.run(look()), strict=True):
        assert sorted(str(text["model"]) for text in response.json["running"]) == sorted(["None", name])
