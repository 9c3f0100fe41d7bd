"""Limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

__all__ = ["Admission", "Limits", "QueueFull", "Range", "Shares", "Turns"]


@dataclass(frozen=True)
class Range:
    """What a number may be.

    Attributes:
        least: Allowed itself, unless `above`.
        most: Allowed itself.
        default: Where nothing is said; None: what `SamplingParams` or the server's configuration says.
        whole: Whether only whole numbers are.
        above: Whether it must be more than `least`.
    """

    least: int | float
    most: int | float
    default: int | None = None
    whole: bool = True
    above: bool = False


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_tokens: Most new tokens.
        max_texts: Most texts: prompts times n.
    """

    max_tokens: int
    max_texts: int

    @property
    def ranges(self) -> dict[str, Range]:
        """What each field that is a number may be."""
        return {
            "max_tokens": Range(1, self.max_tokens),
            "max_completion_tokens": Range(1, self.max_tokens),
            "min_tokens": Range(0, self.max_tokens, 0),
            "temperature": Range(0, 2, 1, whole=False),
            "top_p": Range(0, 1, 1, whole=False, above=True),
            "top_k": Range(0, 1_000_000, 0),
            # Scores divided by much less would overflow.
            "repetition_penalty": Range(0.01, 10, 1, whole=False),
            "seed": Range(-(2**63), 2**63 - 1),
            "n": Range(1, self.max_texts, 1),
            "logprobs": Range(0, 20),
            "top_logprobs": Range(0, 20),
        }


class QueueFull(Exception):
    """No room for more texts now.

    Attributes:
        retry_after: Seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Shares:
    """A bounded amount of something, and which tenant holds how much of it.

    What one tenant has filled is not closed to the others: whoever holds less than an equal share of it gets in. So
    together they may come to hold more, until the first one's are done.

    Attributes:
        most: Of it all.
        total: What is held.
    """

    def __init__(self, most: int) -> None:
        self.most, self.total = most, 0
        self._held: Counter[str] = Counter()

    def has_room(self, amount: int, tenant: str) -> bool:
        """Whether a tenant may have so much more."""
        share = self.most // len(self._held.keys() | {tenant})
        return self.total + amount <= self.most or self._held[tenant] + amount <= share

    @contextlib.contextmanager
    def hold(self, amount: int, tenant: str) -> Iterator[None]:
        """Hold so much while the block runs; `has_room` says whether it may."""
        self.total += amount
        self._held[tenant] += amount
        try:
            yield
        finally:
            self.total -= amount
            self._held[tenant] -= amount
            if not self._held[tenant]:
                del self._held[tenant]


class Turns:
    """One piece of work at a time; tenants in turn, so that one's long pieces hold up another by one piece only."""

    def __init__(self) -> None:
        self._busy = False
        # The tenant whose turn was longest ago comes first.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncGenerator[None]:
        """Wait for a turn, and have it while the block runs."""
        if self._busy:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(tenant, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():
                    self._next()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        self._busy = False
        while self._waiting:
            tenant, queue = self._waiting.popitem(last=False)
            first = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            # Callers that left are skipped.
            if not first.done():
                self._busy = True
                first.set_result(None)
                return


class Admission:
    """Counts the texts that run or wait, so that the queue is bounded and shared; and says when all are done.

    Args:
        num_slots: Texts that run at once.
        max_queue: Texts that may wait.
    """

    def __init__(self, num_slots: int, max_queue: int) -> None:
        self.num_slots = num_slots
        self._shares = Shares(num_slots + max_queue)
        self._seconds = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def texts(self) -> int:
        """How many run or wait."""
        return self._shares.total

    @contextlib.contextmanager
    def enter(self, texts: int, tenant: str = "") -> Iterator[None]:
        """Count some texts of a tenant while the block runs.

        Raises:
            Full: There is no room for them.
        """
        if not self._shares.has_room(texts, tenant):
            # When the texts that are there will be done, if they take as long as the last ones.
            rounds = self.texts / self.num_slots
            raise QueueFull(f"{self.texts} texts run or wait already", min(60.0, max(1.0, rounds * self._seconds)))
        self._idle.clear()
        begun = time.monotonic()
        try:
            with self._shares.hold(texts, tenant):
                yield
        finally:
            self._seconds += 0.1 * (time.monotonic() - begun - self._seconds)
            if not self.texts:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until there is no text."""
        await self._idle.wait()
