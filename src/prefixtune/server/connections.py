"""What a connection may cost: uvicorn's HTTP/1.1 protocol with limits on time and number, and on open files.

uvicorn itself waits for ever for a header, for the rest of a body that nobody reads, and for a client that does not
take its answer. Here a sweep once a second cuts such connections off. When all connections are taken, the one that has
waited longest without a request makes room for a new one, so that silent clients never lock out who has something to
ask. Knows nothing of requests' contents.
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

from prefixtune.server.addresses import Addresses
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import ServeConfig

__all__ = ["Connection", "Connections", "fit_open_files"]


_SWEEP_SECONDS = 1.0
_OTHER_FILES = 128
"""Open files besides connections: the model's, prefixes, uploads, the log, libraries."""


@dataclass(eq=False)
class Connections:
    """All connections of a server, and what they may cost.

    Attributes:
        most: At once.
        per_address: At once from one address of a socket (of IPv6, one network), proxies excepted; 0: any number.
        header_seconds: What a client has for a request's header, from its first byte on; for the first one, from the
            connection on. And for the rest of a body whose answer is sent already.
        client_seconds: What it may take to read a piece of an answer.
        request_seconds: What a request may take in all, whatever happens.
        addresses: Which of them count as one, and which are proxies.
    """

    most: int
    per_address: int
    header_seconds: float
    client_seconds: float
    request_seconds: float
    addresses: Addresses

    def __post_init__(self) -> None:
        self.open: set[Connection] = set()
        # Those without a request, the longest waiting first.
        self.waiting: dict[Connection, None] = {}
        self.by_address: Counter[str] = Counter()

    @classmethod
    def from_config(cls, config: ServeConfig, most: int) -> Connections:
        """What a configuration says, but for the number."""
        return cls(
            most,
            config.max_connections_per_address,
            config.header_timeout,
            config.client_timeout,
            # Body, text work, and the texts have their own limits; this one is for whatever has none.
            2 * (config.deadline + config.client_timeout),
            Addresses(config.proxies),
        )

    def protocol(self) -> type[asyncio.Protocol]:
        """The class that uvicorn is to make for every connection."""
        return type("LimitedConnection", (Connection,), {"shared": self})

    def admit(self, new: Connection) -> bool:
        """Take a connection in, in the place of one that only waits where all are taken; False: there is no room."""
        limit, address = self.per_address, new.address
        if limit and self.by_address[address] >= limit and not new.of_proxy:
            if not self._cut_off_oldest(lambda other: other.address == address):
                return False
        elif len(self.open) >= self.most and not self._cut_off_oldest(lambda _: True):
            return False
        self.open.add(new)
        self.by_address[address] += 1
        return True

    def _cut_off_oldest(self, among: Callable[[Connection], bool]) -> bool:
        for connection in self.waiting:
            if among(connection):
                connection.cut_off()
                return True
        return False

    def forget(self, connection: Connection) -> None:
        """A connection is no more."""
        self.waiting.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    async def sweep(self) -> None:
        """Cut off from time to time whoever takes too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.header_seconds / 4, self.client_seconds / 4))
            now = loop.time()
            for connection in [one for one in self.open if one.is_overdue(now)]:
                connection.cut_off()


class Connection(H11Protocol):
    """One connection, made by uvicorn.

    Attributes:
        shared: All of them, and their limits.
        address: Of the socket's other end; of IPv6, its network.
        of_proxy: Whether it is a named proxy's.
    """

    shared: Connections
    address: str = ""
    of_proxy: bool = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: it is to send a header now."""
        super().connection_made(transport)
        addresses = self.shared.addresses
        # Headers count for requests, not for connections.
        self.address = addresses.of({"client": self.client, "headers": []})
        self.of_proxy = addresses.is_proxy(self.client[0] if self.client else "")
        self._header_since: float | None = self.loop.time()
        self._request_since: float | None = None
        self._stalled_since: float | None = None
        self._closing_since: float | None = None
        if self.shared.admit(self):
            self.shared.waiting[self] = None
        else:
            self._refuse(503, "all connections are taken; try again later.", "too_many_connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was cut off."""
        self.shared.forget(self)
        super().connection_lost(exc)

    def cut_off(self) -> None:
        """End it, whatever is still to be sent."""
        self.shared.forget(self)
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Some bytes of a header or a body."""
        if self._header_since is None and not self._busy:
            self._header_since = self.loop.time()
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """An answer was sent; another request may follow."""
        self._request_since = None
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        """See what the connection waits for now."""
        now = self.loop.time()
        if self._busy:
            self.shared.waiting.pop(self, None)
            self._header_since, self._request_since = None, self._request_since or now
        elif self in self.shared.open and self not in self.shared.waiting:
            self.shared.waiting[self] = None
            # The rest of a body is waited for as for a header.
            self._header_since = None if self.conn.their_state is h11.IDLE else now

    def pause_writing(self) -> None:
        """The client does not read."""
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._stalled_since = None
        super().resume_writing()

    def is_overdue(self, now: float) -> bool:
        """Whether it took longer for something than it may. Between requests uvicorn's own limit holds."""
        shared = self.shared
        if self.transport.is_closing() and self._closing_since is None:
            # What is written is still sent, but not for ever.
            self._closing_since = now
        return (
            _longer(now, self._header_since, shared.header_seconds)
            or _longer(now, self._request_since, shared.request_seconds)
            or _longer(now, self._stalled_since, shared.client_seconds)
            or _longer(now, self._closing_since, shared.client_seconds)
        )

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless another answer is on its way."""
        self._refuse(400, "this is no request of HTTP/1.1 that can be read.", "invalid_http")

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
        """The server stops."""
        # A connection that ended in an error is in no state to be closed in good order.
        with contextlib.suppress(h11.LocalProtocolError):
            super().shutdown()
            return
        self.transport.close()


def _longer(now: float, since: float | None, seconds: float) -> bool:
    return since is not None and now - since > seconds


def fit_open_files(wanted: int) -> tuple[int, int]:
    """Raise the process's limit on open files as far as so many connections need and as it may be.

    Returns:
        How many connections fit, and the limit (0: there is none, or none that is known).
    """
    try:
        import resource
    except ImportError:
        # Windows counts no sockets among files.
        return wanted, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft == resource.RLIM_INFINITY:
        return wanted, 0
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(wanted, soft - _OTHER_FILES)), soft
