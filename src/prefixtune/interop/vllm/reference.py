"""How a request names its prefix, or joined ones: in vLLM's `kv_transfer_params`, signed by the server."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.prefix.folder import signature_of

__all__ = ["JOINER", "PARAMETER", "PrefixPart", "PrefixReference", "Version", "version_of"]


PARAMETER = "prefixtune"
"""The key in `kv_transfer_params` under which a request names its prefix."""

JOINER = "+"
"""Between the names of joined prefixes; no name of a prefix has it."""

Version = tuple[int, int]
"""A file's modification time in nanoseconds and its size in bytes. No inode: it may differ between machines."""


@dataclass(frozen=True)
class PrefixPart:
    """One prefix of a request.

    Attributes:
        name: The prefix's name.
        version: Its file's version when the request arrived.
        length: P.
    """

    name: str
    version: Version
    length: int


@dataclass(frozen=True)
class PrefixReference:
    """The prefix that a request uses: one file's, or several files' one after the other.

    Attributes:
        parts: In their order; at least one.
        is_proven: Whether the server itself wrote this; if not, the request must fail.
    """

    parts: tuple[PrefixPart, ...]
    is_proven: bool = True

    @property
    def name(self) -> str:
        """The name of the prefix, or of all of them: `a+b`."""
        return JOINER.join(part.name for part in self.parts)

    @property
    def length(self) -> int:
        """P, of all parts together."""
        return sum(part.length for part in self.parts)

    def to_kv_transfer_params(self, secret: bytes) -> dict[str, Any]:
        """As vLLM's `kv_transfer_params`, signed."""
        fields = self._fields
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
                # We signed them ourselves.
                return cls(tuple(PrefixPart(name, (time, size), length) for name, (time, size), length in fields))  # type: ignore[union-attr]
        except (TypeError, ValueError, RecursionError):
            pass
        return cls((PrefixPart("", (0, 0), 1),), is_proven=False)

    def cache_salt(self, secret: bytes, client_salt: str | None) -> str:
        """The request's `cache_salt`: another prefix, order, version or forged request never shares its cached blocks.

        Args:
            secret: The server's.
            client_salt: The salt that the client sent.
        """
        return _sign(secret, "salt", [*self._fields, client_salt])

    @property
    def _fields(self) -> list[list[Any]]:
        """As JSON."""
        return [[part.name, list(part.version), part.length] for part in self.parts]


def version_of(path: Path) -> Version | None:
    """A file's version, the same on every machine that shares the folder; None: there is no file."""
    signature = signature_of(path)
    return None if signature is None else signature[:2]


def _sign(secret: bytes, purpose: str, fields: object) -> str:
    text = json.dumps([purpose, fields], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
