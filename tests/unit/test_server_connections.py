"""Addresses that count, and connections that fit the process's open files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefixtune.errors import ConfigError
from prefixtune.server.addresses import Addresses
from prefixtune.server.config import KeyConfig, ServeConfig


@pytest.mark.parametrize(
    ("proxies", "client", "forwarded", "address"),
    [
        ((), "192.0.2.1", "6.6.6.6", "192.0.2.1"),
        (("10.0.0.1",), "192.0.2.1", "6.6.6.6", "192.0.2.1"),
        (("10.0.0.1",), "10.0.0.1", "192.0.2.7", "192.0.2.7"),
        # What stands before the last one that is no proxy, the caller wrote itself.
        (("10.0.0.0/8",), "10.0.0.1", "6.6.6.6, 192.0.2.7, 10.0.0.9", "192.0.2.7"),
        (("10.0.0.0/8",), "10.0.0.1", "6.6.6.6, nonsense, 10.0.0.9", "10.0.0.9"),
        (("10.0.0.0/8",), "10.0.0.1", "", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", "\xff" * 50, "10.0.0.1"),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", "::ffff:192.0.2.7", "192.0.2.7"),
        (("::1",), "::1", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ((), "2001:db8:1:2:3:4:5:6", "", "2001:db8:1:2::/64"),
    ],
)
def test_the_callers_address(proxies: tuple[str, ...], client: str, forwarded: str, address: str) -> None:
    headers = [(b"host", b"x"), (b"x-forwarded-for", forwarded.encode("latin-1"))]
    assert Addresses(proxies).of({"client": (client, 1), "headers": headers}) == address


def test_a_socket_without_an_address() -> None:
    assert Addresses(["10.0.0.1"]).of({"client": None, "headers": []}) == ""


def test_proxies_are_addresses_or_networks() -> None:
    keys = {"me": KeyConfig("sha256:" + "0" * 64)}
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
