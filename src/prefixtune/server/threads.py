"""Threads that tenants share: one with much to do takes at most half of them, so that the others need not wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from prefixtune.server.logs import log
from prefixtune.server.responses import ApiError, unavailable

__all__ = ["FairThreads"]


T = TypeVar("T")


@dataclass(frozen=True)
class _Work:
    run: Callable[[], Any]
    future: Future[Any]


class FairThreads:
    """A pool of threads of which one tenant uses at most half; tenants take turns.

    Args:
        count: Threads, at least 2.
        name: Theirs.
    """

    def __init__(self, count: int, name: str) -> None:
        self._most, self._count, self._name = count // 2, count, name
        self._pool = self._make_pool()
        # Whether the pool has queued work without a thread, and counts one more than it has from then on.
        self._is_off = False
        self._free = count
        self._lock = threading.Lock()
        # The tenant who waits longest for a turn comes first.
        self._waiting: OrderedDict[str, deque[_Work]] = OrderedDict()
        self._running: Counter[str] = Counter()
        self._is_closed = False

    def _make_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._count, thread_name_prefix=self._name)

    def submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        """Do something in a thread, when it is the tenant's turn; until then, it may be cancelled.

        The future has an `ApiError` where the threads are closed before that, or there is none and the system starts
        none.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                _refuse(future, _closed())
                return future
            self._waiting.setdefault(tenant, deque()).append(_Work(work, future))
            self._start()
        return future

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What some work returns.

        A caller that is cancelled goes on when the work has ended, or has not begun: it may change what is used next.
        """
        future = self.submit(tenant, work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if not future.cancel():
                with contextlib.suppress(Exception):
                    await asyncio.wrap_future(future)
            raise

    def close(self) -> None:
        """Take no more work, and refuse what waits; what runs goes on."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, OrderedDict()
        for queue in waiting.values():
            for work in queue:
                _refuse(work.future, _closed())
        self._pool.shutdown(wait=False)

    def _start(self) -> None:
        """Start what may run now; the lock is held."""
        while self._free and (tenant := self._next()) is not None:
            self._renew()
            queue = self._waiting.pop(tenant)
            work = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            self._free -= 1
            self._running[tenant] += 1
            try:
                self._pool.submit(self._do, tenant, work)
            except RuntimeError as error:
                if str(error).startswith("cannot schedule"):
                    # Python ends.
                    self._note_end(tenant)
                    _refuse(work.future, _closed())
                    continue
                log("no_thread", level=logging.WARNING, threads=self._name, reason=str(error))
                # The pool has queued the work all the same, and a thread that it has will do it.
                self._is_off = True
                if not self._pool._threads:
                    self._note_end(tenant)
                    message = "the server can start no thread now; try again later."
                    _refuse(work.future, unavailable(message, "busy", retry_after=5))

    def _renew(self) -> None:
        """Replace a pool that miscounts its threads once nothing runs in it; the lock is held."""
        if self._is_off and self._free == self._count:
            self._pool.shutdown(wait=False)
            self._pool, self._is_off = self._make_pool(), False

    def _note_end(self, tenant: str) -> None:
        """Count a thread as free again; the lock is held."""
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def _next(self) -> str | None:
        return next((tenant for tenant in self._waiting if self._running[tenant] < self._most), None)

    def _do(self, tenant: str, work: _Work) -> None:
        if work.future.set_running_or_notify_cancel():
            try:
                work.future.set_result(work.run())
            except BaseException as error:
                work.future.set_exception(error)
        with self._lock:
            self._note_end(tenant)
            if not self._is_closed:
                self._start()


def _closed() -> ApiError:
    return unavailable("the server is shutting down.", "draining", retry_after=5)


def _refuse(future: Future[Any], error: ApiError) -> None:
    """Let who waits for some work answer with an error."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
