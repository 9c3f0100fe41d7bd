"""API keys: who calls, what they may use, and how much at once.

A key is long and random, so its plain SHA-256 can be stored: there is nothing to guess.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping

from prefixtune.server.responses import bad_request, too_many_requests
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


class Caller:
    """The owner of a key or, where no key is configured, whoever is on this machine.

    Args:
        name: As in [keys.NAME]; `local` without keys.
        rules: What is allowed.
        clock: Monotonic seconds; for tests.
    """

    def __init__(self, name: str, rules: KeyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.rules, self.clock = name, rules, clock
        self._running = 0
        # A token bucket that holds a minute's requests and refills evenly.
        self._available, self._refilled_at = float(rules.requests_per_minute), clock()

    def may_use(self, model: str) -> bool:
        """Whether the key allows a model of this name; there need not be one."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.rules.prefixes)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs.

        Raises:
            ApiError: 429: there are too many of them.
        """
        per_minute, concurrent = self.rules.requests_per_minute, self.rules.concurrent
        if concurrent and self._running >= concurrent:
            message = f"the key {self.name!r} has {concurrent} requests running, which is its limit."
            raise too_many_requests(message, "concurrency_limit_exceeded", 1.0)
        if per_minute:
            now = self.clock()
            refill = (now - self._refilled_at) * per_minute / 60
            self._available, self._refilled_at = min(per_minute, self._available + refill), now
            if self._available < 1:
                wait = float(math.ceil((1 - self._available) * 60 / per_minute))
                message = f"the key {self.name!r} has used its {per_minute} requests a minute."
                raise too_many_requests(message, "rate_limit_exceeded", wait)
            self._available -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Keyring:
    """All keys.

    Args:
        keys: By name; if empty, everybody is the caller `local`, who may use all models but is no admin.
    """

    def __init__(self, keys: Mapping[str, KeyConfig]) -> None:
        self._callers = {rules.hash: Caller(name, rules) for name, rules in keys.items()}
        self._local = None if keys else Caller("local", KeyConfig(hash=hash_key(""), metrics=True))

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
        return self._callers.get(hash_key(key.strip()))


class Gate:
    """Bounds what is inside the server: texts that are prepared, wait or run, or uploads.

    With several tenants, half of it is reserved, in equal shares. The other half is for all: a tenant that has some of
    it already may have as many as there is room left in it, and no more.

    Args:
        limit: The bound.
        tenants: How many tenants there are.

    Attributes:
        count: How many there are.
    """

    def __init__(self, limit: int, tenants: int = 1) -> None:
        self.limit, self.shared, self.count = limit, tenants > 1, 0
        self._reserved = limit // (2 * tenants) if self.shared else 0
        self._free = limit - self._reserved * tenants
        self._of_tenant = collections.Counter[str]()

    @contextlib.contextmanager
    def admit(self, count: int = 1, tenant: str = "") -> Iterator[None]:
        """Count some of them while the block runs.

        Raises:
            ApiError: 429: there is no room now; 400: there never is.
        """
        most = self._reserved + self._free
        if count > most:
            raise bad_request(f"{count} texts are asked for, but this server has room for {most} of a key.")
        own, then = (
            max(0, number - self._reserved) for number in (self._of_tenant[tenant], count + self._of_tenant[tenant])
        )
        room = self._free - sum(max(0, number - self._reserved) for number in self._of_tenant.values())
        if then - own > room or (self.shared and own and then > room):
            raise too_many_requests(f"the queue is full: {self.count} are inside already.", "queue_full", 1.0)
        self.count += count
        self._of_tenant[tenant] += count
        try:
            yield
        finally:
            self.count -= count
            self._of_tenant[tenant] -= count
