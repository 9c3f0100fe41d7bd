"""The address that a request comes from."""

from __future__ import annotations

import pytest

from prefixtune.server.addresses import TrustedProxies


@pytest.mark.parametrize(
    ("proxies", "client", "forwarded", "address"),
    [
        ((), "192.0.2.1", "6.6.6.6", "192.0.2.1"),
        (("10.0.0.1",), "192.0.2.1", "6.6.6.6", "192.0.2.1"),
        (("10.0.0.1",), "10.0.0.1", "192.0.2.7", "192.0.2.7"),
        # Whatever comes before the last address that is no proxy was written by the client.
        (("10.0.0.0/8",), "10.0.0.1", "6.6.6.6, 192.0.2.7, 10.0.0.9", "192.0.2.7"),
        (("10.0.0.0/8",), "10.0.0.1", "6.6.6.6, nonsense, 10.0.0.9", "10.0.0.9"),
        (("10.0.0.0/8",), "10.0.0.1", "", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", "\xff" * 50, "10.0.0.1"),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", "::ffff:192.0.2.7", "192.0.2.7"),
        (("::1",), "::1", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ((), "2001:db8:1:2:3:4:5:6", "", "2001:db8:1:2::/64"),
        # Some proxies write ports.
        (("10.0.0.0/8",), "10.0.0.1", "192.0.2.7:51234", "192.0.2.7"),
        (("10.0.0.0/8",), "10.0.0.1", "6.6.6.6, [2001:db8:1:2:3:4:5:6]:443, 10.0.0.9:80", "2001:db8:1:2::/64"),
        (("10.0.0.0/8",), "10.0.0.1", "[2001:db8:1:2::6]", "2001:db8:1:2::/64"),
    ],
)
def test_the_client_address(proxies: tuple[str, ...], client: str, forwarded: str, address: str) -> None:
    headers = [(b"host", b"x"), (b"x-forwarded-for", forwarded.encode("latin-1"))]
    assert TrustedProxies(proxies).client_address({"client": (client, 1), "headers": headers}) == address


def test_a_socket_without_an_address() -> None:
    assert TrustedProxies(["10.0.0.1"]).client_address({"client": None, "headers": []}) == ""
