"""Requests to a server's application in this process, as uvicorn would send them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

NEVER = "a body that does not arrive"


class Answer:
    """What came back of one request."""

    def __init__(self) -> None:
        self.status, self.headers, self.body, self.ended = 0, dict[str, str](), b"", False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        return self.json["error"]["code"]


async def call(
    app: Any,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    gone: asyncio.Event | None = None,
    slow: Callable[[], Awaitable[None]] | None = None,
    client: str = "127.0.0.1",
) -> Answer:
    """Send a request as uvicorn would; `gone`: when the client goes away; `slow`: how it reads a piece."""
    answer, sent, gone = Answer(), False, gone or asyncio.Event()
    given = {"host": "127.0.0.1:8000", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()], "root_path": "",
        "client": (client, 1),
    }  # fmt: skip

    data = body if isinstance(body, bytes) else b"" if body in (None, NEVER) else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent and body is not NEVER:
            sent = True
            return {"type": "http.request", "body": data}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        if slow is not None:
            await slow()
        answer.body += message.get("body", b"")
        answer.ended = not message.get("more_body", False)

    await asyncio.wait_for(app(scope, receive, send), 30)
    return answer
