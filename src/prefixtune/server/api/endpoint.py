"""What comes before and after every handler: who calls, and whether they may.

The key is looked at before the body is read. What a handler enters into the `exit_stack` of its `RequestContext` lasts
until the response has been sent, streams included. It ends whatever happens: counts go down and the engine's requests
are cancelled, even where the client disconnected before the first byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect

from prefixtune.server.auth import Caller
from prefixtune.server.responses import ApiError, bad_request, forbidden, unavailable
from prefixtune.server.settings import is_loopback
from prefixtune.server.state import ServerState
from prefixtune.server.training import Training

Right = Literal["key", "admin", "metrics", "train"]
"""What an endpoint needs: any key, or a key with this right."""

_PROXY_HEADERS = ("x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via")
"""Headers that show that a proxy passed the request on."""
# For the document; the key is found by `Keyring`.
_BEARER = HTTPBearer(scheme_name="key", description="A key of this server.", auto_error=False)

T = TypeVar("T")


@dataclass(eq=False)
class RequestContext:
    """A request that is being answered.

    Attributes:
        request: The HTTP request.
        state: The server's parts.
        caller: Whose key it has; the tenant among whom the engine shares its slots.
        exit_stack: What ends with the response.
        log_fields: What its log line contains.
        headers: Headers of a successful response.
        started: When its body had arrived, by the monotonic clock.
    """

    request: Request
    state: ServerState
    caller: Caller
    exit_stack: ExitStack
    log_fields: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds until the request's `deadline`, whatever it waits for."""
        return max(0.0, self.started + self.state.config.deadline - time.monotonic())

    def admit(self, texts: int) -> None:
        """Count texts until the response has been sent.

        Raises:
            ApiError: 429: there is no room.
        """
        self.exit_stack.enter_context(self.state.gate.admit(texts, self.caller.name))

    @property
    def training(self) -> Training:
        """Files and jobs.

        Raises:
            ApiError: 404: this server takes none.
        """
        if self.state.training is None:
            message = "this server takes no training jobs; start it with train_workers = 1, or name a database_url."
            raise ApiError(404, message, code="training_off")
        return self.state.training

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run work on one text in the tokenizer's thread: a long text must not block streams.

        Raises:
            ApiError: The request's time is over, or the server has stopped.
            ClientDisconnect: The client disconnected.
        """
        if self.state.closed:
            raise unavailable("the server is shutting down.", "draining", retry_after=5)
        return await self.run_in_time(asyncio.get_running_loop().run_in_executor(self.state.tokenizer_thread, work))

    async def run_in_time(self, work: Awaitable[T], *, grace: float = 0.0) -> T:
        """The result of some work, which is cancelled when the client disconnects or the request's time is over.

        Args:
            work: What to do.
            grace: Seconds more, for work that notices the end of the time itself.

        Raises:
            ApiError: 504.
            ClientDisconnect: The client disconnected.
        """
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self._wait_for_disconnect())
        try:
            await asyncio.wait(tasks, timeout=self.remaining + grace, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            raise ClientDisconnect if tasks[1].done() else self.deadline_exceeded()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait_for_disconnect(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def deadline_exceeded(self) -> ApiError:
        """504: the request's time is over."""
        message = f"the request was not done within {self.state.config.deadline:g} seconds."
        # A retry, by a client or by a load balancer, would take as long.
        return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


class _KeyRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, which reads the body, once it is known who calls."""
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if "\n" in request.scope["path"]:
                # A route's pattern would leave out a last one.
                raise bad_request("the path has a line break.", "name")
            caller = _authenticate(request)
            request.scope["caller"], request.scope["log_fields"]["key"] = caller, caller.name
            return await answer(request)

        return handle


def key_router() -> APIRouter:
    """A router of endpoints that need a key: their handlers take one of the contexts below."""
    return APIRouter(route_class=_KeyRoute)


def _context(right: Right = "key", *, limited: bool = False) -> Any:
    """The dependency of an endpoint.

    Args:
        right: What the caller needs.
        limited: Whether it counts against the key's limits, and is refused while the server shuts down.
    """

    async def context(request: Request, _: Annotated[Any, Depends(_BEARER)]) -> AsyncGenerator[RequestContext]:
        state: ServerState = request.app.state.server
        with ExitStack() as exit_stack:
            found = RequestContext(request, state, request.scope["caller"], exit_stack, request.scope["log_fields"])
            _check_right(found, right)
            if limited:
                if state.draining:
                    raise unavailable("the server is shutting down.", "draining", retry_after=5)
                exit_stack.enter_context(found.caller.request())
            if right == "train":
                _ = found.training
            yield found

    return Depends(context)


KeyContext = Annotated[RequestContext, _context()]
GenerationContext = Annotated[RequestContext, _context(limited=True)]
AdminContext = Annotated[RequestContext, _context("admin")]
MetricsContext = Annotated[RequestContext, _context("metrics")]
TrainingContext = Annotated[RequestContext, _context("train", limited=True)]


def _authenticate(request: Request) -> Caller:
    """Who calls.

    Raises:
        ApiError: 401: the key is unknown; 403: there are no keys, and the request may come from elsewhere.
    """
    keyring = request.app.state.server.keyring
    if keyring.is_open and not _is_local(request.headers.get("host", "")):
        # The name of another site could point to this machine, and its page would then call the server.
        raise forbidden("without keys, the server answers on localhost only.", "host_not_allowed")
    if keyring.is_open and any(name in request.headers for name in _PROXY_HEADERS):
        # Whoever reaches the proxy would reach the server.
        raise forbidden("without keys, the server answers no proxy; `prefixtune serve --new-key`.", "key_needed")
    caller: Caller | None = keyring.find(request.headers.get("authorization"))
    if caller is None:
        message = "an API key is needed, as in 'Authorization: Bearer pt-...'; it is missing or unknown."
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return caller


def _check_right(context: RequestContext, right: Right) -> None:
    """Refuse what the caller may not do.

    Raises:
        ApiError: 403.
    """
    caller, rules, is_open = context.caller, context.caller.rules, context.state.keyring.is_open
    if right == "admin" and not rules.admin:
        reason = "no key is configured" if is_open else f"the key {caller.name!r} is not one"
        raise forbidden(f"an admin key is needed; {reason}.", "admin_key_needed")
    if right == "metrics" and not (rules.metrics or rules.admin):
        raise forbidden(f"the key {caller.name!r} may not read the metrics.", "metrics_not_allowed")
    if right == "train" and context.request.method != "GET":
        if is_open:
            _check_origin(context.request, context.state.config.cors_origins)
        if not rules.train:
            raise forbidden(f"the key {caller.name!r} may not train.", "training_not_allowed")


def _check_origin(request: Request, allowed: tuple[str, ...]) -> None:
    """Refuse a change that another site's page asks a server without keys for.

    A browser sends a form, and a request without a body, without asking the server first.

    Raises:
        ApiError: 403.
    """
    origin = request.headers.get("origin")
    is_own = origin is None or origin.partition("://")[2].lower() == request.headers.get("host", "").lower()
    if not is_own and origin not in allowed:
        raise forbidden("pages of other sites may not use training here.", "origin_not_allowed")


def _is_local(host: str) -> bool:
    """Whether a `Host` is `localhost` or a loopback address.

    >>> _is_local("127.0.0.2:8000"), _is_local("[::1]"), _is_local("127.0.0.1.evil.example")
    (True, True, False)
    """
    name, colon, port = host.rpartition(":")
    return is_loopback((name if colon and port.isdigit() else host).removeprefix("[").removesuffix("]"))
