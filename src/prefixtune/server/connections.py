"""Connections: uvicorn's HTTP/1.1 protocol with limits on their time and number, and on open files.

uvicorn itself waits for ever for a header, for the rest of a body that nobody reads, and for a client that does not
read its response. Here a sweep once a second closes such connections. When all connections are taken, the one that has
been idle longest makes room for a new one, so that silent clients cannot lock others out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefixtune.server.addresses import TrustedProxies
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import ServeConfig

__all__ = ["Connection", "Connections", "fit_open_files"]


_SWEEP_SECONDS = 1.0
_RESERVED_FILES = 128
"""Open files besides connections: the model's, prefixes, uploads, the log, libraries."""


@dataclass(eq=False)
class Connections:
    """All connections of a server, and their limits.

    Attributes:
        max_connections: At once.
        per_address: At once from one address of a socket (of IPv6, one network), except trusted proxies; 0: no limit.
        header_seconds: Time to send a request's header, from its first byte on; for the first request, from the
            connection on. Also for the rest of a body whose response has been sent.
        client_seconds: Time to read a piece of a response.
        request_seconds: Time of a request until its response begins, whatever happens. Streams end by themselves.
        proxies: The trusted proxies.
    """

    max_connections: int
    per_address: int
    header_seconds: float
    client_seconds: float
    request_seconds: float
    proxies: TrustedProxies

    def __post_init__(self) -> None:
        self.open: set[Connection] = set()
        # Those without a request, the longest idle first.
        self.idle: dict[Connection, None] = {}
        self.by_address: Counter[str] = Counter()

    @classmethod
    def from_config(cls, config: ServeConfig, max_connections: int) -> Connections:
        """The limits of a configuration, with the number of connections that the process can open."""
        return cls(
            max_connections,
            config.max_connections_per_address,
            config.header_timeout,
            config.client_timeout,
            # Body, tokenizing and texts have limits of their own; this one is for what has none.
            2 * (config.deadline + config.client_timeout),
            TrustedProxies(config.proxies),
        )

    def protocol(self) -> type[asyncio.Protocol]:
        """The class of which uvicorn makes an object for every connection."""
        return type("LimitedConnection", (Connection,), {"pool": self})

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; where all are taken, an idle one makes room. False: there is no room."""
        limit, address = self.per_address, connection.address
        if limit and self.by_address[address] >= limit and not connection.from_proxy:
            if not self._close_longest_idle(lambda other: other.address == address):
                return False
        elif len(self.open) >= self.max_connections and not self._close_longest_idle(lambda _: True):
            return False
        self.open.add(connection)
        self.by_address[address] += 1
        return True

    def _close_longest_idle(self, condition: Callable[[Connection], bool]) -> bool:
        for connection in self.idle:
            if condition(connection):
                connection.abort()
                return True
        return False

    def remove(self, connection: Connection) -> None:
        """Stop counting a connection."""
        self.idle.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    async def sweep(self) -> None:
        """Abort overdue connections, from time to time."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.header_seconds / 4, self.client_seconds / 4))
            now = loop.time()
            for connection in [connection for connection in self.open if connection.is_overdue(now)]:
                connection.abort()


class Connection(H11Protocol):
    """One connection, made by uvicorn.

    Attributes:
        pool: All of them, and their limits.
        address: Of the socket's other end; of IPv6, its network.
        from_proxy: Whether it is a trusted proxy's.
    """

    pool: Connections
    address: str = ""
    from_proxy: bool = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected: it must send a header now."""
        super().connection_made(transport)
        proxies = self.pool.proxies
        # X-Forwarded-For counts for requests, not for connections.
        self.address = proxies.client_address({"client": self.client, "headers": []})
        self.from_proxy = self.client is not None and self.client[0] in proxies
        self._header_since: float | None = self.loop.time()
        self._request_since: float | None = None
        self._stalled_since: float | None = None
        self._closing_since: float | None = None
        if self.pool.admit(self):
            self.pool.idle[self] = None
        else:
            self._refuse(503, "all connections are taken; try again later.", "too_many_connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected, or the connection was aborted."""
        self.pool.remove(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close it at once, whatever is still to be sent."""
        self.pool.remove(self)
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_responding(self) -> bool:
        """Whether the response has begun."""
        return self._busy and self.cycle.response_started

    def data_received(self, data: bytes) -> None:
        """Bytes of a header or a body arrived."""
        if self._header_since is None and not self._busy:
            self._header_since = self.loop.time()
        super().data_received(data)
        self._update_waits()

    def on_response_complete(self) -> None:
        """A response was sent; another request may follow."""
        self._request_since = None
        super().on_response_complete()
        self._update_waits()

    def _update_waits(self) -> None:
        """Note since when the connection has been waiting, and for what."""
        now = self.loop.time()
        if self._busy:
            self.pool.idle.pop(self, None)
            self._header_since, self._request_since = None, self._request_since or now
        elif self in self.pool.open and self not in self.pool.idle:
            self.pool.idle[self] = None
            # The rest of a body has the time of a header.
            self._header_since = None if self.conn.their_state is h11.IDLE else now

    def pause_writing(self) -> None:
        """The client does not read."""
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stalled_since = None
        super().resume_writing()

    def is_overdue(self, now: float) -> bool:
        """Whether something took longer than it may. Between requests uvicorn's own `keep_alive` holds."""
        limits = self.pool
        if self.transport.is_closing() and self._closing_since is None:
            # What was written is still sent, but not for ever.
            self._closing_since = now
        return (
            _longer(now, self._header_since, limits.header_seconds)
            or (not self._is_responding and _longer(now, self._request_since, limits.request_seconds))
            or _longer(now, self._stalled_since, limits.client_seconds)
            or _longer(now, self._closing_since, limits.client_seconds)
        )

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless a response has already begun."""
        self._refuse(400, "this is not a valid HTTP/1.1 request.", "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without a request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(ApiError(status, message, code=code).response().body)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            events = (
                h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            with contextlib.suppress(h11.LocalProtocolError):
                for event in events:
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def shutdown(self) -> None:
        """Close it, because the server stops."""
        # After a protocol error a connection cannot be closed in good order.
        with contextlib.suppress(h11.LocalProtocolError):
            super().shutdown()
            return
        self.transport.close()


def _longer(now: float, since: float | None, seconds: float) -> bool:
    return since is not None and now - since > seconds


def fit_open_files(wanted: int) -> tuple[int, int]:
    """Raise the process's limit on open files as far as the wanted connections need it and the system allows.

    Returns:
        How many connections fit, and the limit on open files (0: none, or unknown).
    """
    try:
        import resource
    except ImportError:
        # Windows counts no sockets among files.
        return wanted, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if soft == resource.RLIM_INFINITY:
        return wanted, 0
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(wanted, soft - _RESERVED_FILES)), soft
