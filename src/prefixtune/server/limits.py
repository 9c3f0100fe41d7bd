"""How much is inside the server at once: per key, and in all."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator

from prefixtune.server.responses import bad_request, too_many_requests


class RequestLimit:
    """The limits of one key: requests a minute, and at once.

    Args:
        key: The key's name, for messages.
        per_minute: Requests a minute; 0: no limit.
        concurrent: Requests at once; 0: no limit.
        clock: Monotonic seconds; for tests.
    """

    def __init__(
        self, key: str, per_minute: int = 0, concurrent: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.key, self.per_minute, self.concurrent, self.clock = key, per_minute, concurrent, clock
        self._running = 0
        # A token bucket that holds a minute's requests and refills evenly.
        self._available, self._refilled_at = float(per_minute), clock()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs.

        Raises:
            ApiError: 429: there are too many of them.
        """
        if self.concurrent and self._running >= self.concurrent:
            message = f"the key {self.key!r} has {self.concurrent} requests running, which is its limit."
            raise too_many_requests(message, "concurrency_limit_exceeded", 1.0)
        if self.per_minute:
            now = self.clock()
            refill = (now - self._refilled_at) * self.per_minute / 60
            self._available, self._refilled_at = min(self.per_minute, self._available + refill), now
            if self._available < 1:
                wait = float(math.ceil((1 - self._available) * 60 / self.per_minute))
                message = f"the key {self.key!r} has used its {self.per_minute} requests a minute."
                raise too_many_requests(message, "rate_limit_exceeded", wait)
            self._available -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Gate:
    """Bounds what is inside the server: texts that are prepared, wait or run, or uploads.

    A tenant that has some inside already may have as many as there is room left, and no more: one alone fills half,
    and those who come later always find room.

    Args:
        limit: The bound.
        shared: Whether there are several tenants.

    Attributes:
        count: How many there are.
    """

    def __init__(self, limit: int, *, shared: bool = False) -> None:
        self.limit, self.shared, self.count = limit, shared, 0
        self._of_tenant = collections.Counter[str]()

    @contextlib.contextmanager
    def admit(self, count: int = 1, tenant: str = "") -> Iterator[None]:
        """Count some of them while the block runs.

        Raises:
            ApiError: 429: there is no room now; 400: there never is.
        """
        if count > self.limit:
            raise bad_request(f"{count} texts are asked for, but this server has room for {self.limit}.")
        own, room = self._of_tenant[tenant], self.limit - self.count
        if count > room or (self.shared and own and own + count > room):
            raise too_many_requests(f"the queue is full: {self.count} are inside already.", "queue_full", 1.0)
        self.count += count
        self._of_tenant[tenant] += count
        try:
            yield
        finally:
            self.count -= count
            self._of_tenant[tenant] -= count
