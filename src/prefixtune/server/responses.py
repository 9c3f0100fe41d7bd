"""What goes back: JSON, errors in OpenAI's shape, and streams of server-sent events.

Knows nothing of what is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixtune.errors import DataError, PrefixError, RequestError, did_you_mean

__all__ = [
    "ALIVE",
    "DONE",
    "ApiError",
    "EventStream",
    "as_api_error",
    "bad_request",
    "event",
    "forbidden",
    "not_found",
    "reply",
    "run_until_disconnect",
    "too_many",
    "unavailable",
]


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ALIVE = ": waiting\n\n"
"""What a stream says when there is no news: proxies cut silent connections, and clients pass comments over."""
DONE = "data: [DONE]\n\n"
"""How a stream ends."""

_LONGEST = 1000
"""Characters of a message about what was sent."""

T = TypeVar("T")


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: Of HTTP.
        message: For people; names no path.
        code: For programs.
        param: The field that is at fault.
        headers: Such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # Both may repeat what was sent, however long it was.
        self.message, self.param = _shortened(message), None if param is None else _shortened(param)
        self.status, self.code = status, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As a response."""
        return reply(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None, *, hint: str = "") -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, f"{message} {_sentence(hint)}" if hint else message, param=param, code=code)


def forbidden(message: str, code: str) -> ApiError:
    """403: the caller may not."""
    return ApiError(403, message, code=code)


def not_found(what: str, name: str, known: list[str] | None = None) -> ApiError:
    """404: there is no such thing; the nearest known one is named where `known` is not too long."""
    hint = f" {_sentence(did_you_mean(name, known))}" if known and len(known) <= 50 else ""
    return ApiError(404, f"there is no {what} {name[:128]!r}.{hint}", code=f"{what.replace(' ', '_')}_not_found")


def too_many(message: str, code: str, retry_after: float) -> ApiError:
    """429: later."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


def unavailable(message: str, code: str, *, retry_after: int = 0) -> ApiError:
    """503: it is not the request's fault; without `retry_after`, clients are told not to try again by themselves."""
    headers = {"Retry-After": str(retry_after)} if retry_after else {"x-should-retry": "false"}
    return ApiError(503, message, code=code, headers=headers)


def as_api_error(error: PrefixError) -> ApiError:
    """An error of this project: what the request is to blame for is 400, everything else 503.

    Only for messages that hold no path: those of the engine, its store, and the tasks.
    """
    if isinstance(error, RequestError | DataError):
        return bad_request(error.message, hint=error.hint)
    return unavailable(error.message, "not_served")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(_json(value), status, headers, media_type="application/json")


def event(value: Any) -> str:
    """A server-sent event."""
    return f"data: {_json(value)}\n\n"


def _json(value: Any) -> str:
    # Half a surrogate pair, which a model's bytes can give, is no UTF-8.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")


# --- as long as somebody listens --------------------------------------------------------------------------------------


async def run_until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The outcome of some work, which is given up when the client goes away.

    Args:
        receive: Of the request, whose body was read.
        work: Cancelled when the client goes away.

    Raises:
        ClientDisconnect: It went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A stream of server-sent events, as an ASGI application.

    Errors that come up when the stream has begun are told as an event, since the status was sent. When the client goes
    away, or does not read, the events are closed.

    Args:
        events: From `event`; closed in any case.
        patience: Seconds that the client may take to read a piece.
        limit: Seconds that all may take.
        headers: Of the reply, besides its own.
    """

    def __init__(
        self, events: AsyncGenerator[str], patience: float, limit: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self.events, self.patience, self.limit, self.headers = events, patience, limit, dict(headers or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as long as the client is there."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            # nginx must not gather the pieces.
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in self.headers.items()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with asyncio.timeout(self.limit):
                await run_until_disconnect(receive, self._send(send))
        except TimeoutError:
            # Who reads a byte now and then would hold its slots for ever.
            raise ClientDisconnect from None

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            try:
                async for text in events:
                    await self._piece(send, text)
            except ApiError as error:
                await self._piece(send, event(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _piece(self, send: Send, text: str) -> None:
        try:
            async with asyncio.timeout(self.patience):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except TimeoutError:
            raise ClientDisconnect from None
