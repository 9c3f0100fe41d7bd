"""Around everything: a request's name, the security headers, the log line, the figures, and errors nobody foresaw."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixtune.server.metrics import Metrics
from prefixtune.server.responses import ApiError

__all__ = ["Middleware", "log", "set_up_logs"]


_ID = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_GONE = 499
"""In logs and figures: the client went away before it had its answer."""
_QUIET = ("/healthz", "/readyz", "/metrics", "/v1/status")
"""Asked for all the time; logged only when something is wrong."""


class Middleware:
    """An ASGI middleware; the outermost.

    Args:
        app: What is inside.
        metrics: Is told of every request.
        with_cors: Whether pages of other origins may read the answers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, with_cors: bool = False) -> None:
        self.app, self.metrics = app, metrics
        self.headers = {**_HEADERS, **({"cross-origin-resource-policy": "cross-origin"} if with_cors else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and see what comes of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"id": name}
        scope["facts"] = facts
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                for key, value in self.headers.items():
                    headers.setdefault(key, value)
            await send(message)

        error: Exception | None = None
        try:
            with self.metrics.open_requests.track_inprogress():
                await self.app(scope, receive, tell)
        except ClientDisconnect:
            status = _GONE
        except Exception as bug:
            error = bug
            if not status:
                message = f"something went wrong here; the log tells more of the request {name}."
                await ApiError(500, message, code="internal_error").response()(scope, receive, tell)
            status = 500
        self._note(scope, status or _GONE, time.monotonic() - begun, facts, error)

    def _note(self, scope: Scope, status: int, seconds: float, facts: dict[str, Any], error: Exception | None) -> None:
        route = facts.pop("route", "unknown")
        self.metrics.requests.labels(route, status).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        level = logging.ERROR if status == 500 else logging.INFO
        if route in _QUIET and status < 400:
            level = logging.DEBUG
        told = {"method": scope["method"], "path": scope["path"][:200], "status": status, "seconds": round(seconds, 4)}
        log("request", level=level, error=error, **told, **facts)


_LOG = logging.getLogger("prefixtune.server")


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """Write a line.

    Args:
        event: What happened, in a word.
        level: How bad it is.
        error: An error that nobody foresaw; its traceback is written.
        **facts: What there is to know of it.
    """
    _LOG.log(level, event, extra={"facts": facts}, exc_info=error)


def set_up_logs(level: str) -> None:
    """Write what this process logs as JSON lines, from a level on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    # uvicorn's and the engine's too; other libraries only speak up when something is wrong.
    for name, lowest in (("prefixtune", level), ("uvicorn", "warning"), ("asyncio", "warning")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(logging.getLevelNamesMapping()[each.upper()] for each in (level, lowest)))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
