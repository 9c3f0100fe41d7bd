"""Server-sent events, files, and work that stops when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import IO, Any, TypeVar
from urllib.parse import quote

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.responses import ApiError, json_text

__all__ = ["DONE", "KEEP_ALIVE", "TimedStream", "event", "event_stream", "file_stream", "run_until_disconnect"]


KEEP_ALIVE = format_sse_event(comment="waiting")
"""Sent while there is nothing new: proxies cut silent connections, and clients ignore comments."""
DONE = format_sse_event(data_str="[DONE]")
"""The end of a stream."""
_CHUNK = 2**18
_SLOWEST_DOWNLOAD = 2**16
"""Bytes a second."""

T = TypeVar("T")


def event(value: Any, *, is_large: bool = False) -> bytes:
    """A server-sent event; arguments as of `json_text`."""
    return format_sse_event(data_str=json_text(value, is_large=is_large))


def event_stream(context: RequestContext, events: AsyncGenerator[bytes]) -> EventStream:
    """A response in pieces, for a client that may be slow within limits."""
    config = context.state.config
    return EventStream(events, config.client_timeout, config.deadline + config.client_timeout, context.headers)


def file_stream(context: RequestContext, file: IO[bytes], filename: str) -> TimedStream:
    """A file to be saved, from where it stands to its end; it is closed in any case."""
    size, config = os.fstat(file.fileno()).st_size, context.state.config
    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
    }
    # A slow client gets the time that it needs for all of a large file.
    return TimedStream(_chunks(file), config.client_timeout, config.deadline + size / _SLOWEST_DOWNLOAD, headers)


async def _chunks(file: IO[bytes]) -> AsyncGenerator[bytes]:
    with file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk


async def run_until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client disconnects.

    Args:
        receive: Of a request whose body was read.
        work: What to do.

    Raises:
        ClientDisconnect: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, disconnected):
            task.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class TimedStream(StreamingResponse):
    """A response in pieces that ends in bounded time.

    When the client disconnects, or does not read, the pieces are closed.

    Args:
        pieces: Of the body; closed in any case.
        write_timeout: Seconds that the client may take to read a piece.
        total_timeout: Seconds that the whole stream may take.
        headers: More headers of the response.
        media_type: Of the body.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        write_timeout: float,
        total_timeout: float,
        headers: Mapping[str, str] | None = None,
        media_type: str = "application/octet-stream",
    ) -> None:
        super().__init__(pieces, headers=headers, media_type=media_type)
        self.pieces = pieces
        self.write_timeout, self.total_timeout = write_timeout, total_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces, as long as the client is connected."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self.total_timeout):
                await run_until_disconnect(receive, self._send_pieces(send))
        except TimeoutError:
            # A client that reads a byte now and then would hold what it takes for ever.
            raise ClientDisconnect from None

    async def _send_pieces(self, send: Send) -> None:
        async with contextlib.aclosing(self.pieces) as pieces:
            async for data in pieces:
                await self._send_piece(send, data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, send: Send, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.write_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ClientDisconnect from None


class EventStream(TimedStream):
    """A stream of server-sent events.

    The status is sent before the first event, so a later error is sent as an event.

    Args:
        events: From `event`; closed in any case.
        write_timeout: As for `TimedStream`, like the others.
        total_timeout: Likewise.
        headers: Likewise.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        write_timeout: float,
        total_timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # nginx must not buffer the events.
        more = {"x-accel-buffering": "no", **(headers or {})}
        super().__init__(_with_error(events), write_timeout, total_timeout, more, "text/event-stream")


async def _with_error(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events and, where they end with an error, that as the last one."""
    async with contextlib.aclosing(events):
        try:
            async for data in events:
                yield data
        except ApiError as error:
            yield event(error.body())
