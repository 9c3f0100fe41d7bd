"""How a request names its prefix: in vLLM's `kv_transfer_params`, signed by the server."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.prefix.folder import signature_of

__all__ = ["PARAMETER", "PrefixReference", "Version", "version_of"]


PARAMETER = "prefixtune"
"""The key in `kv_transfer_params` under which a request names its prefix."""

Version = tuple[int, int]
"""A file's modification time in nanoseconds and its size in bytes. No inode: it may differ between machines."""


@dataclass(frozen=True)
class PrefixReference:
    """The prefix that a request uses.

    Attributes:
        name: The prefix's name.
        version: Its file's version when the request arrived.
        length: P.
        is_proven: Whether the server itself wrote this; if not, the request must fail.
    """

    name: str
    version: Version
    length: int
    is_proven: bool = True

    def to_kv_transfer_params(self, secret: bytes) -> dict[str, Any]:
        """As vLLM's `kv_transfer_params`, signed."""
        fields = [self.name, list(self.version), self.length]
        return {PARAMETER: {"prefix": fields, "proof": _sign(secret, "load", fields)}}

    @classmethod
    def from_kv_transfer_params(cls, params: object, secret: bytes) -> PrefixReference | None:
        """The inverse of `to_kv_transfer_params`; None where the request names no prefix.

        What a client wrote there itself, or a server with another secret, is not proven. Never raises, whatever the
        input: it runs in vLLM's scheduler.
        """
        if not isinstance(params, Mapping) or PARAMETER not in params:
            return None
        value = params[PARAMETER]
        fields, proof = (value.get("prefix"), value.get("proof")) if isinstance(value, Mapping) else (None, None)
        try:
            expected = _sign(secret, "load", fields)
            if hmac.compare_digest(str(proof).encode("utf-8", "replace"), expected.encode()):
                name, (modified, size), length = fields  # type: ignore[misc]  # We signed them ourselves.
                return cls(name, (modified, size), length)
        except (TypeError, ValueError, RecursionError):
            pass
        return cls("", (0, 0), 1, is_proven=False)

    def cache_salt(self, secret: bytes, client_salt: str | None) -> str:
        """The request's `cache_salt`: another prefix, version or forged request never shares its cached blocks.

        Args:
            secret: The server's.
            client_salt: The salt that the client sent.
        """
        return _sign(secret, "salt", [self.name, list(self.version), client_salt])


def version_of(path: Path) -> Version | None:
    """A file's version, the same on every machine that shares the folder; None: there is no file."""
    signature = signature_of(path)
    return None if signature is None else signature[:2]


def _sign(secret: bytes, purpose: str, fields: object) -> str:
    text = json.dumps([purpose, fields], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
