"""HTTP as ASGI sends it: request bodies and responses read, replaced and rewritten, and errors in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from prefixtune.errors import RequestError

__all__ = [
    "APIError",
    "App",
    "JSONRewriter",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "read_body",
    "replay_body",
    "send_json",
    "with_content_length",
]


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class APIError(RequestError):
    """A request that the middleware refuses itself.

    Args:
        message: What is wrong.
        param: The field of the request.
        status: Of the response.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        error_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.status}}


async def read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """A request's body; empty where the client has disconnected; None: it is too long."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            return None
        if not message.get("more_body"):
            return b"".join(chunks)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first, and then what else comes (the client's disconnect)."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def with_content_length(scope: Scope, length: int) -> Scope:
    """The scope of a request with another body."""
    headers = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def send_json(send: Send, status: int, value: object) -> None:
    """Send a whole response."""
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class JSONRewriter:
    """A `send` that changes every JSON value in a response: its whole body, or each event of a stream.

    Args:
        send: Where the response goes.
        change: Returns the new value.
        headers: Added to the response.
    """

    def __init__(self, send: Send, change: Callable[[Any], Any], headers: Mapping[str, str] | None = None) -> None:
        self._send, self._change = send, change
        self._headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self._start: Message = {}
        self._buffer = b""
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        """Send a message of the response on."""
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": [*message["headers"], *self._headers]}
            content_types = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._is_stream = any(value.startswith(b"text/event-stream") for value in content_types)
            if self._is_stream:
                await self._send(self._start)
        elif message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._buffer += message.get("body", b"")
            more_body = bool(message.get("more_body"))
            if self._is_stream:
                await self._send_events(more_body)
            elif not more_body:
                await self._send_whole()

    async def _send_events(self, more_body: bool) -> None:
        """Send the events that are complete, and at the end whatever is left."""
        events, blank_line, rest = self._buffer.rpartition(b"\n\n")
        complete, self._buffer = (events + blank_line, rest) if more_body else (self._buffer, b"")
        if complete or not more_body:
            body = b"\n".join(map(self._change_line, complete.split(b"\n")))
            await self._send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _send_whole(self) -> None:
        body = self._change_json(self._buffer)
        await self._send(with_content_length(self._start, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    def _change_line(self, line: bytes) -> bytes:
        field, colon, value = line.partition(b": ")
        return field + colon + self._change_json(value) if field == b"data" and value.startswith(b"{") else line

    def _change_json(self, text: bytes) -> bytes:
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return json.dumps(self._change(value), ensure_ascii=False, separators=(",", ":")).encode()
