"""Addresses that count, and connections that fit the process's open files."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from prefixtune.errors import ConfigError
from prefixtune.server.addresses import TrustedProxies
from prefixtune.server.connections import Connections
from prefixtune.server.settings import KeyConfig, ServeConfig


@pytest.mark.parametrize(
    ("proxies", "limited"), [((), True), (("2001:db8:1:2::/64",), False), (("2001:db8:1:3::/64",), True)]
)
def test_connections_of_one_ipv6_network_count_together(proxies: tuple[str, ...], limited: bool) -> None:
    async def connect() -> list[bool]:
        connections = Connections(10, 2, 15.0, 30.0, 600.0, TrustedProxies(proxies))
        config = Config(app=lambda: None, log_config=None)
        config.load()
        protocol = connections.protocol()
        closed = []
        for index in range(1, 4):
            transport = Transport((f"2001:db8:1:2::{index}", 9))
            connection = protocol(config, ServerState(), {})  # type: ignore[call-arg]
            connection.connection_made(transport)
            # Idle ones make room for others, but these have requests.
            connections.idle.clear()
            closed.append(transport.is_closing())
        return closed

    assert asyncio.run(connect()) == [False, False, limited]


def test_a_response_that_has_begun_may_take_the_time_that_it_sets_itself() -> None:
    """A slow client gets the time that it needs for all of a large file."""

    async def serve() -> list[bool]:
        begin, begun = asyncio.Event(), asyncio.Event()

        async def app(_: Any, receive: Any, send: Any) -> None:
            await begin.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"piece", "more_body": True})
            begun.set()
            while (await receive())["type"] != "http.disconnect":
                pass

        connections = Connections(10, 0, 15.0, 30.0, 600.0, TrustedProxies(()))
        config = Config(app=app, log_config=None, lifespan="off")
        config.load()
        connection: Any = connections.protocol()(config, ServerState(), {})  # type: ignore[call-arg]
        connection.connection_made(Transport(("127.0.0.1", 9)))
        connection.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        later = asyncio.get_running_loop().time() + 700
        overdue = [connection.is_overdue(later)]
        begin.set()
        await begun.wait()
        overdue.append(connection.is_overdue(later))
        connection.connection_lost(None)
        return overdue

    assert asyncio.run(serve()) == [True, False]


class Transport(asyncio.Transport):
    """A socket of an address, which takes what is written."""

    def __init__(self, client: tuple[str, int]) -> None:
        super().__init__({"peername": client, "sockname": ("::1", 1)})
        self.closed = False

    def write(self, data: Any) -> None:
        """Drop it."""

    def close(self) -> None:
        """Close."""
        self.closed = True

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self.closed


def test_the_largest_body_fits_the_memory_for_bodies() -> None:
    with pytest.raises(ConfigError, match=r"max_pending_mib is 1, which is less than one request may have \(max_body"):
        ServeConfig(max_body_kib=1025, max_pending_mib=1)
    assert ServeConfig(max_body_kib=1024, max_pending_mib=1).max_pending_mib == 1


def test_proxies_are_addresses_or_networks() -> None:
    keys = {"me": KeyConfig(hash="sha256:" + "0" * 64)}
    assert ServeConfig(proxies=("10.0.0.0/8", "::1"), keys=keys).proxies == ("10.0.0.0/8", "::1")
    with pytest.raises(ConfigError, match=r"proxies are named and no key is configured"):
        ServeConfig(proxies=("10.0.0.0/8", "::1"))
    with pytest.raises(ConfigError, match=r"proxies has 'nginx', but needs addresses"):
        ServeConfig(proxies=("nginx",))


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "fits", "limit"),
    [(256, 2000, 500, 500, 628), (256, 400, 500, 272, 400), (64, 64, 500, 1, 64), (1000, 1000, 500, 500, 1000)],
)
def test_connections_fit_the_limit_on_open_files(soft: int, hard: int, wanted: int, fits: int, limit: int) -> None:
    pytest.importorskip("resource", reason="only POSIX counts connections among open files")
    # In a process of its own, whose limits nobody else has.
    code = (
        "import resource, sys\n"
        "from prefixtune.server.connections import fit_open_files\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"print(*fit_open_files({wanted}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(fits), str(limit), str(limit)]


def test_without_a_known_limit_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixtune.server.connections import fit_open_files

    monkeypatch.setitem(sys.modules, "resource", None)
    assert fit_open_files(500) == (500, 0)
