"""Streams: silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import Response, completion, send
from prefixtune.engine.request import SequenceOutput

WAITING = b": waiting\n\n"


def test_a_silent_stream_sends_keep_alive_comments(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    monkeypatch.setattr("prefixtune.server.api.generation.KEEP_ALIVE_SECONDS", 0.05)
    later: list[Any] = []
    monkeypatch.setattr(state.worker, "submit", lambda request, on_output, deadline: later.append((request, on_output)))

    async def wait() -> Response:
        response = Response()
        running = asyncio.ensure_future(send(app, "POST", "/v1/chat/completions", body, into=response))
        async with asyncio.timeout(10):
            while response.body.count(WAITING) < 2:
                await asyncio.sleep(0.01)
        request, tell = later[0]
        tell(SequenceOutput(request.id, 0, (), "done", "stop"))
        return await running

    body = completion(stream=True)
    del body["prompt"]
    body["messages"] = [{"role": "user", "content": "hi"}]
    state.backbone.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        response = asyncio.run(wait())
    finally:
        state.backbone.tokenizer.chat_template = None
    assert response.body.count(WAITING) >= 2
    assert response.body.endswith(b"data: [DONE]\n\n")
