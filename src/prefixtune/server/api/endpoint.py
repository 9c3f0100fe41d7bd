"""One endpoint as an ASGI application: who calls, and whether they may; then its handler; then the whole response.

What a handler enters into the `exit_stack` of its `RequestContext` lasts until the response has been sent, streams
included. It ends whatever happens: counts go down and the engine's requests are cancelled, even where the client
disconnected before the first byte.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.errors import PrefixError
from prefixtune.server.auth import Caller
from prefixtune.server.limits import QueueFull, RateLimited
from prefixtune.server.responses import ApiError, api_error, forbidden, too_many_requests, unavailable
from prefixtune.server.state import ServerState

__all__ = ["Endpoint", "RequestContext", "Right"]


Right = Literal["key", "admin", "metrics"]
"""What an endpoint needs: any key, or a key with this right."""

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_PROXY_HEADERS = ("x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via")
"""Headers that show that a proxy passed the request on."""


@dataclass(eq=False)
class RequestContext:
    """A request that is being answered.

    Attributes:
        request: The HTTP request.
        state: The server's parts.
        caller: Whose key it has.
        address: Where it comes from.
        exit_stack: What ends with the response.
        log_fields: What its log line contains.
        headers: Headers of a successful response.
        started: When its header had arrived, by the monotonic clock.
    """

    request: Request
    state: ServerState
    caller: Caller
    address: str
    exit_stack: ExitStack
    log_fields: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds until the request's `deadline`, whatever it waits for."""
        return max(0.0, self.started + self.state.config.deadline - time.monotonic())

    @property
    def name(self) -> str:
        """The name in the path."""
        return str(self.request.path_params.get("name", ""))

    @property
    def tenant(self) -> str:
        """Among whom capacity is shared fairly: keys or, without keys, addresses."""
        return self.address if self.state.keyring.is_open else self.caller.name


class Endpoint:
    """An ASGI application of one handler.

    Args:
        handler: Makes the response.
        state: The server's parts.
        right: What the caller needs.
        limited: Whether it counts against the key's limits, and is refused while the server shuts down.
    """

    def __init__(
        self,
        handler: Callable[[RequestContext], Awaitable[ASGIApp]],
        state: ServerState,
        *,
        right: Right = "key",
        limited: bool = False,
    ) -> None:
        self.handler, self.state, self.right, self.limited = handler, state, right, limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        with ExitStack() as exit_stack:
            try:
                response = await self._respond(request, exit_stack, scope["log_fields"])
            except (ApiError, PrefixError, RateLimited, QueueFull) as error:
                refusal = self._refusal(error)
                scope["log_fields"]["refused"] = refusal.code or "invalid_request"
                response = refusal.response()
            await response(scope, receive, send)

    async def _respond(self, request: Request, exit_stack: ExitStack, log_fields: dict[str, Any]) -> ASGIApp:
        caller = self._authenticate(request)
        log_fields["key"] = caller.name
        address = self.state.proxies.client_address(request.scope)
        if request.client is not None and request.client.host in self.state.proxies:
            exit_stack.enter_context(self.state.address_limit.request(address))
        if self.limited:
            if self.state.draining:
                raise unavailable("the server is shutting down.", "draining", retry_after=5)
            exit_stack.enter_context(caller.limit.request())
        return await self.handler(RequestContext(request, self.state, caller, address, exit_stack, log_fields))

    def _authenticate(self, request: Request) -> Caller:
        keyring = self.state.keyring
        if keyring.is_open and not _is_local(request.headers.get("host", "")):
            # The name of another site could point to this machine, and its page would then call the server.
            raise forbidden("without keys, the server answers on localhost only.", "host_not_allowed")
        if keyring.is_open and any(name in request.headers for name in _PROXY_HEADERS):
            # Whoever reaches the proxy would reach the server.
            raise forbidden("without keys, the server answers no proxy; `prefixtune serve --new-key`.", "key_needed")
        caller = keyring.find(request.headers.get("authorization"))
        if caller is None:
            message = "an API key is needed, as in 'Authorization: Bearer pt-...'; it is missing or unknown."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        rules = caller.rules
        if self.right == "admin" and not rules.admin:
            reason = "no key is configured" if keyring.is_open else f"the key {caller.name!r} is not one"
            raise forbidden(f"an admin key is needed; {reason}.", "admin_key_needed")
        if self.right == "metrics" and not (rules.metrics or rules.admin):
            raise forbidden(f"the key {caller.name!r} may not read the metrics.", "metrics_not_allowed")
        return caller

    def _refusal(self, error: Exception) -> ApiError:
        metrics = self.state.metrics
        if isinstance(error, RateLimited):
            metrics.rejected.labels(error.reason).inc()
            return too_many_requests(f"{error}.", f"{error.reason}_limit_exceeded", error.retry_after)
        if isinstance(error, QueueFull):
            metrics.rejected.labels("queue_full").inc()
            return too_many_requests(f"the queue is full: {error}.", "queue_full", error.retry_after)
        refusal = api_error(error) if isinstance(error, PrefixError) else error
        if not isinstance(refusal, ApiError):
            raise error
        if refusal.status in (401, 403, 503):
            metrics.rejected.labels(refusal.code or "unavailable").inc()
        return refusal


def _is_local(host: str) -> bool:
    name, _, port = host.rpartition(":")
    return host.lower() in _LOCAL_NAMES or (port.isdigit() and name.lower() in _LOCAL_NAMES)
