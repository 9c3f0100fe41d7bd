"""The outer layer of every request: its id, the size of its body, security headers, the log line, and metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixtune.server.logs import log
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import ServeConfig
from prefixtune.server.state import ServerState

_SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_CLIENT_CLOSED_REQUEST = 499
"""In the log and in metrics: the client disconnected before it had its response."""
_QUIET_ROUTES = ("/healthz", "/readyz", "/metrics", "/v1/status")
"""Polled all the time; logged only where something is wrong."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""A request's id that a proxy gave it."""
_FORM_OVERHEAD = 2**16
"""Bytes that a form may have besides its file."""


class Middleware:
    """An ASGI middleware; the outermost."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state
        cors = {"cross-origin-resource-policy": "cross-origin"} if state.config.cors_origins else {}
        self.headers = {**_SECURITY_HEADERS, **cors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, then log and count its outcome."""
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        log_fields: dict[str, Any] = {"id": request_id}
        # Every GET is also a HEAD, whose body uvicorn does not send.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        app_scope = {**scope, "method": method, "is_head": scope["method"] == "HEAD", "log_fields": log_fields}
        status, error = 0, None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for key, value in self.headers.items():
                    headers.setdefault(key, value)
            try:
                async with asyncio.timeout(self.state.config.deadline):
                    await send(message)
            except TimeoutError:
                # Nobody reads the response: what it counts for must not stay taken.
                raise ClientDisconnect from None

        self.state.num_open += 1
        try:
            await self.app(app_scope, _limited(receive, self.state.config, scope["path"]), send_with_headers)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except Exception as unexpected:
            error = unexpected
            if not status:
                message = f"an internal error; the log has more on request {request_id}."
                response = ApiError(500, message, code="internal_error").response()
                await response(app_scope, receive, send_with_headers)
            status = 500
        finally:
            self.state.num_open -= 1
        route = app_scope["route"].path_format if "route" in app_scope else "unknown"
        status, seconds = status or _CLIENT_CLOSED_REQUEST, time.monotonic() - started
        self.state.metrics.request_done(route, status, seconds)
        level = logging.ERROR if status == 500 else logging.INFO
        if route in _QUIET_ROUTES and status < 400:
            level = logging.DEBUG
        line = {"method": scope["method"], "path": scope["path"][:200], "status": status, "seconds": round(seconds, 4)}
        log("request", level=level, error=error, **line, **log_fields)


def _limited(receive: Receive, config: ServeConfig, path: str) -> Receive:
    """The messages of a request, as long as its body is not larger than its path allows."""
    size, limit = 0, config.max_body_kib * 2**10
    if path == "/v1/files":
        limit = config.max_file_mib * 2**20 + _FORM_OVERHEAD
    elif path.startswith("/v1/models/"):
        limit = config.max_upload_mib * 2**20

    async def receive_and_count() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            # The rest of it is not read.
            raise HTTPException(413, f"the body is larger than {limit:,} bytes.", headers={"Connection": "close"})
        return message

    return receive_and_count
