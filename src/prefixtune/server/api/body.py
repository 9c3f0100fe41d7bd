"""Reading the body of a request, within limits on size, time and memory."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.generation import deadline_exceeded
from prefixtune.server.api.streaming import run_until_disconnect
from prefixtune.server.limits import QueueFull
from prefixtune.server.responses import ApiError, bad_request

__all__ = ["parse_in_turn", "parse_json", "read_json", "receive_body"]


_SMALL_BODY = 16 * 1024
"""Bytes of a body that is parsed in the event loop; a larger one in a thread, so that no other stream waits for it."""
_MAX_DEPTH = 72
"""Lists and objects within each other: a JSON schema may have 64, and is within three more."""

T = TypeVar("T")


async def read_json(context: RequestContext, parse: Callable[[dict[str, Any]], T]) -> T:
    """The JSON object in the body of a request, within the server's limits, parsed further.

    Args:
        context: The request.
        parse: Makes a request of the object.

    Raises:
        ApiError: It is no JSON, too large, too slow, or no valid request; or the request's time is over.
        QueueFull: The bodies of other requests take all the memory for bodies.
        ClientDisconnect: The client disconnected.
    """
    config, pending = context.state.config, context.state.pending_bytes
    limit = 1024 * config.max_body_kib
    headers = context.request.headers
    # Beside a body in chunks, a length says nothing.
    length = "" if "transfer-encoding" in headers else headers.get("content-length", "")
    # Counted before it is read; without a length, as the largest that is allowed.
    size = min(int(length), limit) if length.isascii() and length.isdigit() else limit
    if not pending.has_room(size, context.tenant):
        raise QueueFull(f"requests of {pending.used:,} bytes are being read or processed", 1.0)
    _check_content_type(context.request)
    received, seconds = bytearray(), config.client_timeout
    with pending.hold(size, context.tenant):
        await receive_body(context.request, received.extend, limit=limit, seconds=seconds, chunk_seconds=seconds)
    body = bytes(received)
    # Its real size then counts until the response has been sent: it stays in memory while its text waits its turn.
    context.exit_stack.enter_context(pending.hold(len(body), context.tenant))

    def work() -> T:
        return parse(parse_json(body))

    return work() if len(body) <= _SMALL_BODY else await parse_in_turn(context, work)


async def parse_in_turn(context: RequestContext, work: Callable[[], T]) -> T:
    """Parse a large body in a thread, when it is the caller's turn.

    Raises:
        ApiError: The request's time is over, or the server has stopped.
        ClientDisconnect: The client disconnected.
    """
    parsing = context.state.parse_threads.run(context.tenant, work)
    try:
        async with asyncio.timeout(context.remaining):
            return await run_until_disconnect(context.request.receive, parsing)
    except TimeoutError:
        raise deadline_exceeded(context) from None


def _check_content_type(request: Request) -> None:
    """A body must be JSON by its content type, which a form of another site could not set."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content type is {kind[:80]!r}, but must be application/json."
        raise ApiError(415, message, code="unsupported_media_type")


async def receive_body(
    request: Request, write: Callable[[bytes], Any], *, limit: int, seconds: float, chunk_seconds: float
) -> int:
    """Write a body as it arrives; returns its size.

    Args:
        request: Whose body.
        write: Takes a chunk, of at most 64 KiB; what it returns is awaited, if it can be.
        limit: Most bytes; a larger body is refused before any of it is read, if its header says so.
        seconds: Time for all of it.
        chunk_seconds: Time for each chunk.

    Raises:
        ApiError: It is too large or too slow.
        ClientDisconnect: The client disconnected.
    """
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise bad_request("the content length is not a number.")
    if int(length) > limit:
        raise _body_too_large(limit)
    clock = asyncio.get_running_loop().time
    end, size = clock() + seconds, 0
    try:
        async with asyncio.timeout(min(seconds, chunk_seconds)) as timer:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _body_too_large(limit)
                written = write(chunk)
                if inspect.isawaitable(written):
                    # The disk's time is not the client's.
                    timer.reschedule(end)
                    await written
                timer.reschedule(min(end, clock() + chunk_seconds))
    except TimeoutError:
        if not timer.expired():
            # A slow disk.
            raise
        chunks = f", or a piece of it within {chunk_seconds:g}" if chunk_seconds < seconds else ""
        message = f"the body did not arrive within {seconds:g} seconds{chunks}."
        raise ApiError(408, message, code="body_timeout") from None
    return size


def _body_too_large(limit: int) -> ApiError:
    """413: the body is too large."""
    return ApiError(413, f"the body is larger than {limit:,} bytes.", code="body_too_large")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: It is not JSON, no object, nested too deeply, or contains invalid text or a number that is not finite.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        _check_depth(value)
        # Half a surrogate pair is legal in JSON, but no tokenizer takes it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise bad_request(f"the body is nested more than {_MAX_DEPTH} levels deep.", code="invalid_json") from None
    except UnicodeEncodeError:
        raise bad_request(
            "the body contains half a surrogate pair, which is not valid text.", code="invalid_json"
        ) from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8.", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> ApiError:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, which no request needs: later code, such as that of an error message, may recurse.

    Raises:
        RecursionError: Lists and objects are nested too deeply.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise RecursionError
