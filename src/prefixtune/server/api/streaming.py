"""Server-sent events, files, and work that stops when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable
from typing import IO, Any, TypeVar
from urllib.parse import quote

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.requests import ClientDisconnect

from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.responses import ApiError, json_text

KEEP_ALIVE = format_sse_event(comment="waiting")
"""Sent while there is nothing new: proxies cut silent connections, and clients ignore comments."""
DONE = format_sse_event(data_str="[DONE]")
"""The end of a stream."""
_CHUNK = 2**18

T = TypeVar("T")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return format_sse_event(data_str=json_text(value))


def event_stream(context: RequestContext, events: AsyncGenerator[bytes]) -> StreamingResponse:
    """A stream of server-sent events.

    The status is sent before the first event, so a later error is sent as an event.
    """
    # nginx must not buffer the events.
    headers = {"x-accel-buffering": "no", **context.headers}
    return StreamingResponse(_with_error(events), headers=headers, media_type="text/event-stream")


async def _with_error(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events and, where they end with an error, that as the last one."""
    async with contextlib.aclosing(events):
        try:
            async for data in events:
                yield data
        except ApiError as error:
            yield event(error.body())


def file_stream(context: RequestContext, file: IO[bytes], filename: str) -> StreamingResponse:
    """A file to be saved, from where it stands to its end; it is closed in any case."""
    context.exit_stack.callback(file.close)
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
    }
    pieces = iter(lambda: file.read(_CHUNK), b"")
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


async def run_in_time(context: RequestContext, work: Awaitable[T], *, grace: float = 0.0) -> T:
    """The result of some work, which is cancelled when the client disconnects or the request's time is over.

    Args:
        context: The request.
        work: What to do.
        grace: Seconds more, for work that notices the end of the time itself.

    Raises:
        ApiError: 504.
        ClientDisconnect: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(context))
    try:
        seconds = context.remaining + grace
        await asyncio.wait({working, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect if disconnected.done() else deadline_exceeded(context)
    finally:
        for task in (working, disconnected):
            task.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_for_disconnect(context: RequestContext) -> None:
    while (await context.request.receive())["type"] != "http.disconnect":
        pass


def deadline_exceeded(context: RequestContext) -> ApiError:
    """504: the request's time is over."""
    message = f"the request was not done within {context.state.config.deadline:g} seconds."
    # A retry, by a client or by a load balancer, would take as long.
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})
