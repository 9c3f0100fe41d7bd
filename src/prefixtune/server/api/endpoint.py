"""One endpoint as an ASGI application: who asks, and may they; then the handler; then its reply, to its very end.

What a handler enters into its `Call`'s stack lasts until the reply is sent, streams included, and ends whatever
happens: counts go down and the engine's requests are given up, even where the client vanished before the first byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.errors import PrefixError
from prefixtune.server.auth import Caller, RateLimited
from prefixtune.server.limits import QueueFull
from prefixtune.server.responses import ApiError, as_api_error, bad_request, forbidden, too_many, unavailable
from prefixtune.server.state import ServerState

__all__ = ["Call", "Endpoint", "check_length", "read_body", "too_large"]


_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_OF_PROXIES = ("x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via")
"""Headers that say that a proxy stands between."""


@dataclass(eq=False)
class Call:
    """A request on its way.

    Attributes:
        request: The request.
        services: The server's parts.
        caller: Who asks.
        address: Where from.
        stack: What ends with the reply.
        facts: For the log.
        headers: Of a reply that is no error.
        begun: When its header was there, by the monotonic clock.
    """

    request: Request
    services: ServerState
    caller: Caller
    address: str
    stack: ExitStack
    facts: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds that are left of the time of a request (`deadline`), whatever it waits for or works on."""
        return max(0.0, self.begun + self.services.config.deadline - time.monotonic())

    @property
    def name(self) -> str:
        """The name in the path."""
        return str(self.request.path_params.get("name", ""))

    @property
    def tenant(self) -> str:
        """Among whom room is shared fairly: keys; without keys, addresses."""
        return self.address if self.services.keyring.is_open else self.caller.name


class Endpoint:
    """An ASGI application of one handler.

    Args:
        handle: Makes a reply.
        services: The server's parts.
        needs: `key`: anybody with a key; `admin` or `metrics`: a key with that right.
        counted: Whether it counts against the key's limits, and is refused while the server drains.
    """

    def __init__(
        self,
        handle: Callable[[Call], Awaitable[ASGIApp]],
        services: ServerState,
        *,
        needs: str = "key",
        counted: bool = False,
    ) -> None:
        self.handle, self.services, self.needs, self.counted = handle, services, needs, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        with ExitStack() as stack:
            try:
                reply = await self._reply(request, stack, scope["facts"])
            except (ApiError, PrefixError, RateLimited, QueueFull) as error:
                refused = self._refusal(error)
                scope["facts"]["refused"] = refused.code or "invalid_request"
                reply = refused.response()
            await reply(scope, receive, send)

    async def _reply(self, request: Request, stack: ExitStack, facts: dict[str, Any]) -> ASGIApp:
        caller = self._caller(request)
        facts["key"] = caller.name
        address = self.services.addresses.of(request.scope)
        forwarded = self.services.addresses.is_proxy(request.client.host if request.client else "")
        if forwarded and not stack.enter_context(self.services.per_address.request(address)):
            raise RateLimited("address", f"{self.services.per_address.limit} requests of this address run already", 1.0)
        if self.counted:
            if self.services.draining:
                raise unavailable("the server is about to stop.", "draining", retry_after=5)
            stack.enter_context(caller.request())
        return await self.handle(Call(request, self.services, caller, address, stack, facts))

    def _caller(self, request: Request) -> Caller:
        keyring = self.services.keyring
        if keyring.is_open and not _is_local(request.headers.get("host", "")):
            # A page of another site could have its own name point here.
            raise forbidden("without keys, the server answers on localhost only.", "host_not_allowed")
        if keyring.is_open and any(name in request.headers for name in _OF_PROXIES):
            # Whoever reaches the proxy would reach the server.
            raise forbidden("without keys, the server answers no proxy; `prefixtune serve --new-key`.", "key_needed")
        caller = keyring.find(request.headers.get("authorization"))
        if caller is None:
            message = "an API key is needed, as in 'Authorization: Bearer pt-...'; none was given, or it is unknown."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        rules = caller.rules
        if self.needs == "admin" and not rules.admin:
            told = "no key is configured" if keyring.is_open else f"the key {caller.name!r} is none"
            raise forbidden(f"an admin key is needed; {told}.", "admin_key_needed")
        if self.needs == "metrics" and not (rules.metrics or rules.admin):
            raise forbidden(f"the key {caller.name!r} may not read the metrics.", "metrics_not_allowed")
        return caller

    def _refusal(self, error: Exception) -> ApiError:
        metrics = self.services.metrics
        if isinstance(error, RateLimited):
            metrics.rejected.labels(error.reason).inc()
            return too_many(f"{error}.", f"{error.reason}_limit_exceeded", error.retry_after)
        if isinstance(error, QueueFull):
            metrics.rejected.labels("queue_full").inc()
            return too_many(f"the queue is full: {error}.", "queue_full", error.retry_after)
        refused = as_api_error(error) if isinstance(error, PrefixError) else error
        if not isinstance(refused, ApiError):
            raise error
        if refused.status in (401, 403, 503):
            metrics.rejected.labels(refused.code or "unavailable").inc()
        return refused


def _is_local(host: str) -> bool:
    name, _, port = host.rpartition(":")
    return host.lower() in _LOCAL or (port.isdigit() and name.lower() in _LOCAL)


async def read_body(request: Request, *, most: int, patience: float) -> bytes:
    """The body of a request that must be JSON.

    Args:
        request: Not read yet.
        most: Bytes that are allowed.
        patience: Seconds that the client may take.

    Raises:
        ApiError: It is no JSON by its content type (which a form of another site could not set), too large or too
            slow.
        ClientDisconnect: The client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content type is {kind[:80]!r}, but must be application/json."
        raise ApiError(415, message, code="unsupported_media_type")
    check_length(request, most)
    body = bytearray()
    try:
        async with asyncio.timeout(patience):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {patience:g} seconds.", code="body_timeout") from None
    return bytes(body)


def check_length(request: Request, most: int) -> None:
    """Refuse a body by the length that its header tells, before any of it is read.

    Raises:
        ApiError: It is too large, or the length is no number.
    """
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise bad_request("the content length is no number.")
    if int(length) > most:
        raise too_large(most)


def too_large(most: int) -> ApiError:
    """413: the body is too large."""
    return ApiError(413, f"the body is larger than {most:,} bytes.", code="body_too_large")
