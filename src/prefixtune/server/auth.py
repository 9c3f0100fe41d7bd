"""Who asks: API keys, what each may use, and how often.

A key is random and long, so that its plain SHA-256 can be kept: there is nothing to guess. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prefixtune.server.settings import KeyConfig

__all__ = ["Caller", "Keyring", "RateLimited", "hash_key", "new_key"]


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return f"pt-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """What is stored of a key.

    >>> hash_key("pt-example")[:20]
    'sha256:28300d9f43ad3'
    """
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


class RateLimited(Exception):
    """A caller asks too often, or for too much at once.

    Attributes:
        reason: `rate` or `concurrency`.
        retry_after: Seconds after which it may be better.
    """

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass(eq=False)
class Caller:
    """Somebody with a key, or, where no key is configured, whoever is on this machine.

    Attributes:
        name: As in [keys.NAME]; `local` without keys.
        rules: What is allowed.
        clock: Seconds that only grow; for tests.
    """

    name: str
    rules: KeyConfig
    clock: Callable[[], float] = time.monotonic
    _running: int = field(default=0, init=False)
    _left: float = field(default=0.0, init=False)
    _counted: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._left, self._counted = float(self.rules.requests_per_minute), self.clock()

    def may_use(self, model: str) -> bool:
        """Whether a model is among those allowed; says nothing of whether there is such a model."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.rules.prefixes)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs.

        Raises:
            RateLimited: It is one too many, now or within a minute.
        """
        limit, rate = self.rules.concurrent, self.rules.requests_per_minute
        if limit and self._running >= limit:
            raise RateLimited(
                "concurrency", f"the key {self.name!r} has {limit} requests running, which is its limit", 1.0
            )
        if rate:
            now = self.clock()
            # A bucket that holds a minute's requests and is filled evenly.
            self._left = min(rate, self._left + (now - self._counted) * rate / 60)
            self._counted = now
            if self._left < 1:
                wait = float(math.ceil((1 - self._left) * 60 / rate))
                raise RateLimited("rate", f"the key {self.name!r} has used its {rate} requests a minute", wait)
            self._left -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Keyring:
    """All keys.

    Args:
        keys: By name; none: everybody is the caller `local`, who may use all models but is no admin.
    """

    def __init__(self, keys: Mapping[str, KeyConfig]) -> None:
        self._callers = [Caller(name, rules) for name, rules in keys.items()]
        self._local = None if keys else Caller("local", KeyConfig("", metrics=True))

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._local is not None

    def find(self, authorization: str | None) -> Caller | None:
        """Whose key a header `Authorization: Bearer ...` holds; None: nobody's."""
        if self._local is not None:
            return self._local
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hash_key(key.strip()).encode()
        found = None
        # All of them, so that the time tells nothing.
        for caller in self._callers:
            if hmac.compare_digest(digest, caller.rules.hash.encode()):
                found = caller
        return found
