"""The address that a request comes from: the socket's, or what a trusted proxy says.

Anybody can send a header `X-Forwarded-For`. It counts only from a trusted proxy, and of its addresses only the last one
that is no trusted proxy itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["TrustedProxies", "parse_network"]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_IPV6_NETWORK_BITS = 64
"""One IPv6 site usually owns all addresses that share these leading bits."""
_MAX_HEADER_LENGTH = 1024
"""Characters of the header that are read, from its end."""


def parse_network(text: str) -> Network:
    """An address, or a network such as 10.0.0.0/8.

    Raises:
        ValueError: It is neither.
    """
    return ipaddress.ip_network(text, strict=False)


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` counts.

    Args:
        proxies: Their addresses and networks.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        self._proxies = [parse_network(proxy) for proxy in proxies]

    def __contains__(self, address: str) -> bool:
        """Whether an address is that of a trusted proxy."""
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._proxies)

    def client_address(self, scope: Scope) -> str:
        """The client's address; of IPv6, its network; empty where the socket has none.

        >>> scope = {"client": ("10.0.0.1", 9), "headers": [(b"x-forwarded-for", b"6.6.6.6, 192.0.2.7")]}
        >>> TrustedProxies(["10.0.0.0/8"]).client_address(scope), TrustedProxies().client_address(scope)
        ('192.0.2.7', '10.0.0.1')
        """
        address = str((scope.get("client") or ("",))[0])
        if address in self:
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            for entry in reversed(forwarded.decode("latin-1")[-_MAX_HEADER_LENGTH:].split(",")):
                parsed = _parse(_without_port(entry.strip()))
                if parsed is None:
                    break
                address = str(parsed)
                if address not in self:
                    break
        parsed = _parse(address)
        if isinstance(parsed, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))
        return address


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
