"""What a request may ask for, and how much runs or waits at once: per key, per address, and in all."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AddressLimit",
    "Admission",
    "FairLock",
    "Limits",
    "OpenRequests",
    "QueueFull",
    "RateLimited",
    "RequestLimit",
    "SharedCapacity",
]


# --- one request ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_tokens: Most new tokens.
        max_texts: Most texts: prompts times n.
        max_joined: Most prefixes that are joined.
    """

    max_tokens: int
    max_texts: int
    max_joined: int = 8


# --- one key, one address ---------------------------------------------------------------------------------------------


class RateLimited(Exception):
    """A caller sends too many requests.

    Attributes:
        reason: `rate`: in a minute; `concurrency`: at once; `address`: at once from one address.
        retry_after: Seconds after which a retry may succeed.
    """

    def __init__(self, reason: Literal["rate", "concurrency", "address"], message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


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
            RateLimited: There are too many of them.
        """
        if self.concurrent and self._running >= self.concurrent:
            raise RateLimited(
                "concurrency", f"the key {self.key!r} has {self.concurrent} requests running, which is its limit", 1.0
            )
        if self.per_minute:
            now = self.clock()
            refill = (now - self._refilled_at) * self.per_minute / 60
            self._available, self._refilled_at = min(self.per_minute, self._available + refill), now
            if self._available < 1:
                wait = float(math.ceil((1 - self._available) * 60 / self.per_minute))
                raise RateLimited(
                    "rate", f"the key {self.key!r} has used its {self.per_minute} requests a minute", wait
                )
            self._available -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class AddressLimit:
    """Requests at once of each address behind a trusted proxy; of sockets, the connections are counted.

    Args:
        concurrent: For one address; 0: no limit.
    """

    def __init__(self, concurrent: int) -> None:
        self.concurrent = concurrent
        self._running: Counter[str] = Counter()

    @contextlib.contextmanager
    def request(self, address: str) -> Iterator[None]:
        """Count a request while the block runs.

        Raises:
            RateLimited: There are too many of this address.
        """
        if self.concurrent and self._running[address] >= self.concurrent:
            raise RateLimited("address", f"{self.concurrent} requests of this address are running already", 1.0)
        self._running[address] += 1
        try:
            yield
        finally:
            self._running[address] -= 1
            if not self._running[address]:
                del self._running[address]


# --- all requests -----------------------------------------------------------------------------------------------------


class QueueFull(Exception):
    """There is no room for the request now.

    Attributes:
        retry_after: Seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SharedCapacity:
    """A bounded amount of something, shared fairly among tenants.

    Where one tenant has filled it, it is still open to a tenant who holds less than an equal share. Together they may
    then hold more than the capacity, until the first one's requests end.

    Attributes:
        capacity: The bound.
        used: How much is held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._used_by: Counter[str] = Counter()

    def has_room(self, amount: int, tenant: str) -> bool:
        """Whether a tenant may hold this much more."""
        share = self.capacity // len(self._used_by.keys() | {tenant})
        return self.used + amount <= self.capacity or self._used_by[tenant] + amount <= share

    @contextlib.contextmanager
    def hold(self, amount: int, tenant: str) -> Iterator[None]:
        """Hold an amount while the block runs; check `has_room` before."""
        self.used += amount
        self._used_by[tenant] += amount
        try:
            yield
        finally:
            self.used -= amount
            self._used_by[tenant] -= amount
            if not self._used_by[tenant]:
                del self._used_by[tenant]


class FairLock:
    """A lock that tenants get in turn, so that many requests of one delay another by one piece of work only."""

    def __init__(self) -> None:
        self._locked = False
        # The tenant who waits longest for a turn comes first.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def hold(self, tenant: str) -> AsyncGenerator[None]:
        """Wait for the lock, and hold it while the block runs."""
        if self._locked:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(tenant, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
        self._locked = True
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        self._locked = False
        while self._waiting:
            tenant, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            # Cancelled ones are skipped.
            if not turn.done():
                self._locked = True
                turn.set_result(None)
                return


class OpenRequests:
    """Counts the requests that are being answered, whatever they wait for, and knows when all have ended."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs."""
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    async def wait_until_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()


class Admission:
    """The queue's limit: bounds the texts that run or wait, and shares the room fairly.

    As many may be prepared meanwhile: their prefix is read, their text tokenized, their schema compiled.

    Args:
        num_slots: Texts that run at once.
        max_queue: Texts that may wait.
    """

    def __init__(self, num_slots: int, max_queue: int) -> None:
        self.num_slots = num_slots
        self._capacity = SharedCapacity(num_slots + max_queue)
        self._in_preparation = SharedCapacity(num_slots + max_queue)
        self._seconds_per_request = 1.0

    @property
    def texts(self) -> int:
        """How many texts run or wait."""
        return self._capacity.used

    @property
    def texts_in_preparation(self) -> int:
        """How many texts are being prepared."""
        return self._in_preparation.used

    @contextlib.contextmanager
    def prepare(self, texts: int, tenant: str = "") -> Iterator[None]:
        """Count some texts of a tenant as being prepared while the block runs.

        Raises:
            QueueFull: There is no room for them.
        """
        if not self._in_preparation.has_room(texts, tenant):
            raise QueueFull(f"{self.texts_in_preparation} texts are being prepared already", 1.0)
        with self._in_preparation.hold(texts, tenant):
            yield

    @contextlib.contextmanager
    def admit(self, texts: int, tenant: str = "") -> Iterator[None]:
        """Count some texts of a tenant while the block runs.

        Raises:
            QueueFull: There is no room for them.
        """
        if not self._capacity.has_room(texts, tenant):
            # When the present texts will have ended, if they take as long as recent ones.
            rounds = self.texts / self.num_slots
            retry_after = min(60.0, max(1.0, rounds * self._seconds_per_request))
            raise QueueFull(f"{self.texts} texts run or wait already", retry_after)
        started = time.monotonic()
        try:
            with self._capacity.hold(texts, tenant):
                yield
        finally:
            self._seconds_per_request += 0.1 * (time.monotonic() - started - self._seconds_per_request)
