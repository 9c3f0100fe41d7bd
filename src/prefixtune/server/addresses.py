"""Where a request comes from: the socket's own address, or what a proxy says that the configuration names.

Anybody can write a header `X-Forwarded-For`; it counts only where a named proxy sent it, and of its addresses only the
last one that is no proxy.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["Addresses", "PerAddress", "parse_network"]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SITE = 64
"""Leading bits of an IPv6 address that name a site, which has all addresses behind them."""


def parse_network(text: str) -> Network:
    """An address, or a network such as 10.0.0.0/8.

    Raises:
        ValueError: It is neither.
    """
    return ipaddress.ip_network(text, strict=False)


class Addresses:
    """Where requests come from.

    Args:
        proxies: Addresses and networks of proxies whose word counts.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        self._proxies = [parse_network(proxy) for proxy in proxies]

    def is_proxy(self, address: str) -> bool:
        """Whether an address is that of a named proxy."""
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._proxies)

    def of(self, scope: Scope) -> str:
        """The caller's address; of IPv6, its network; empty where the socket has none.

        >>> scope = {"client": ("10.0.0.1", 9), "headers": [(b"x-forwarded-for", b"6.6.6.6, 192.0.2.7")]}
        >>> Addresses(["10.0.0.0/8"]).of(scope), Addresses().of(scope)
        ('192.0.2.7', '10.0.0.1')
        """
        address = str((scope.get("client") or ("",))[0])
        if self.is_proxy(address):
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            for entry in reversed(forwarded.decode("latin-1")[-_LONGEST:].split(",")):
                parsed = _parse(_without_port(entry.strip()))
                if parsed is None:
                    break
                address = str(parsed)
                if not self.is_proxy(address):
                    break
        parsed = _parse(address)
        if isinstance(parsed, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((parsed, _SITE), strict=False))
        return address


class PerAddress:
    """Counts requests at once of each address that a proxy names; of sockets, the connections are counted.

    Args:
        limit: For one address; 0: any number.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._running: Counter[str] = Counter()

    @contextlib.contextmanager
    def request(self, address: str) -> Iterator[bool]:
        """Count a request while the block runs; yields whether there was room for it."""
        self._running[address] += 1
        try:
            yield not self.limit or self._running[address] <= self.limit
        finally:
            self._running[address] -= 1
            if not self._running[address]:
                del self._running[address]


_LONGEST = 1024
"""Characters of the header that are read, from its end."""


def _without_port(entry: str) -> str:
    """The address of `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1`, `[2001:db8::1]` and `[2001:db8::1]:80`."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    address, _, rest = entry.partition(":")
    return entry if ":" in rest else address


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
