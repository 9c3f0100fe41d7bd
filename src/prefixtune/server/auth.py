"""API keys: who calls, and what they may use.

A key is long and random, so its plain SHA-256 can be stored: there is nothing to guess.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from prefixtune.server.limits import RequestLimit
from prefixtune.server.settings import KeyConfig


def new_key() -> str:
    """A new key: 256 random bits."""
    return f"pt-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """The hash of a key, which is what is stored.

    >>> hash_key("pt-example")[:20]
    'sha256:28300d9f43ad3'
    """
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


@dataclass(frozen=True, eq=False)
class Caller:
    """The owner of a key or, where no key is configured, whoever is on this machine.

    Attributes:
        name: As in [keys.NAME]; `local` without keys.
        rules: What is allowed.
        limit: How many requests a minute, and at once.
    """

    name: str
    rules: KeyConfig
    limit: RequestLimit

    @classmethod
    def from_config(cls, name: str, rules: KeyConfig) -> Caller:
        """The caller of a table [keys.NAME]."""
        return cls(name, rules, RequestLimit(name, rules.requests_per_minute, rules.concurrent))

    def may_use(self, model: str) -> bool:
        """Whether the key allows a model of this name; there need not be one."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.rules.prefixes)


class Keyring:
    """All keys.

    Args:
        keys: By name; if empty, everybody is the caller `local`, who may use all models but is no admin.
    """

    def __init__(self, keys: Mapping[str, KeyConfig]) -> None:
        self._callers = [Caller.from_config(name, rules) for name, rules in keys.items()]
        self._local = None if keys else Caller.from_config("local", KeyConfig(hash=hash_key(""), metrics=True))

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._local is not None

    def find(self, authorization: str | None) -> Caller | None:
        """The caller whose key is in a header `Authorization: Bearer ...`; None: the key is unknown."""
        if self._local is not None:
            return self._local
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hash_key(key.strip()).encode()
        match = None
        # Always compares with all of them, so that the time reveals nothing.
        for caller in self._callers:
            if hmac.compare_digest(digest, caller.rules.hash.encode()):
                match = caller
        return match
