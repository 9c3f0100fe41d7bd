"""Requests of the engine on behalf of one call: handing them in, hearing of them, giving them up.

The engine tells its news in a thread of its own; here they arrive in the event loop. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from prefixtune.engine import Output, Request
from prefixtune.engine.worker import EngineWorker
from prefixtune.server.metrics import Metrics

__all__ = ["Admission", "Full", "Heard", "Job", "Shares", "Turns"]

_SILENCE = 15.0
"""Seconds without news after which an empty one is given, so that a stream can say that it is alive."""


class Full(Exception):
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
            raise Full(f"{self.texts} texts run or wait already", min(60.0, max(1.0, rounds * self._seconds)))
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


@dataclass(frozen=True)
class Heard:
    """News of one text.

    Attributes:
        prompt: Number of its prompt within the call.
        output: What the engine says.
    """

    prompt: int
    output: Output


@dataclass(eq=False)
class _Text:
    """What was heard of one text."""

    tokens: int = 0
    last: float = 0.0


@dataclass(eq=False)
class Job:
    """The engine's requests of one call.

    Attributes:
        worker: The engine.
        requests: One for each prompt.
        model: The name under which they are asked for.
        deadline: Seconds that they may take.
        metrics: Is told what is measured.
        first: Seconds to the first token of all.
        tokens: Tokens written so far.
    """

    worker: EngineWorker
    requests: Sequence[Request]
    model: str
    deadline: float
    metrics: Metrics
    first: float | None = field(default=None, init=False)
    tokens: int = field(default=0, init=False)
    _begun: float = field(default_factory=time.monotonic, init=False)
    _news: asyncio.Queue[Output] = field(default_factory=asyncio.Queue, init=False)
    _open: dict[tuple[str, int], _Text] = field(default_factory=dict, init=False)

    def submit(self) -> None:
        """Hand the requests in; `give_up` must follow in any case.

        Raises:
            PrefixError: The engine refuses one.
        """
        loop = asyncio.get_running_loop()

        def hear(output: Output) -> None:
            # The loop may be gone when the server was told to stop at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._news.put_nowait, output)

        for request in self.requests:
            self.worker.submit(request, hear, deadline=self.deadline)
            self._open |= {(request.id, index): _Text() for index in range(request.n)}

    def give_up(self) -> None:
        """Free whatever still runs; nothing happens when all is done."""
        for request in {name for name, _ in self._open}:
            self.worker.cancel(request)
        for text in self._open.values():
            self.metrics.text_done(self.model, "gone", text.tokens)
        self._open.clear()

    async def heard(self) -> AsyncGenerator[Heard | None]:
        """News until every text has ended; None after a while without any."""
        numbers = {request.id: number for number, request in enumerate(self.requests)}
        while self._open:
            try:
                async with asyncio.timeout(_SILENCE):
                    output = await self._news.get()
            except TimeoutError:
                yield None
                continue
            self._measure(output)
            yield Heard(numbers[output.request], output)

    def _measure(self, output: Output) -> None:
        place = (output.request, output.index)
        text, now = self._open[place], time.monotonic()
        if output.tokens:
            if text.tokens:
                self.metrics.next_token(now - text.last)
            else:
                self.metrics.first_token(now - self._begun)
                self.first = self.first or now - self._begun
            text.last = now
            text.tokens += len(output.tokens)
            self.tokens += len(output.tokens)
        if output.finished is not None:
            self.metrics.text_done(self.model, output.finished, text.tokens)
            del self._open[place]
