"""What a caller sees of the running texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from asgi_client import Response, bearer, completion, send
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


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
