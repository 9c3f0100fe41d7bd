"""Threads that tenants share: who has much to do delays nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from prefixtune.server.responses import ApiError
from prefixtune.server.threads import FairThreads


@pytest.fixture
def threads() -> Iterator[FairThreads]:
    made = FairThreads(4, "test")
    yield made
    made.close()


def test_one_tenant_uses_half_of_the_threads(threads: FairThreads) -> None:
    release, running = threading.Event(), threading.Semaphore(0)

    def wait() -> bool:
        running.release()
        return release.wait(20)

    slow = [threads.submit("a", wait) for _ in range(10)]
    for _ in range(2):
        assert running.acquire(timeout=5)
    assert [threads.submit(name, lambda: 1).result(5) for name in ("b", "c", "b")] == [1, 1, 1]
    assert not running.acquire(blocking=False)
    release.set()
    assert all(future.result(5) for future in slow)


def test_tenants_take_turns(threads: FairThreads) -> None:
    release, order = threading.Event(), list[str]()

    def note(name: str) -> None:
        time.sleep(0.05)
        order.append(name)

    busy = [threads.submit(name, lambda: release.wait(20)) for name in ("x", "x", "y", "y")]
    waiting = [threads.submit(name, partial(note, name)) for name in ("a", "a", "a", "a", "b")]
    release.set()
    assert all(future.result(5) for future in busy)
    for future in waiting:
        future.result(5)
    assert order.index("b") < 3


def test_errors_and_the_end(threads: FairThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        threads.submit("c", lambda: 1 / 0).result(5)
    release = threading.Event()
    first, second = (threads.submit("a", lambda: release.wait(20)) for _ in range(2))
    third = threads.submit("a", lambda: release.wait(20))
    threads.close()
    for refused in (third, threads.submit("b", lambda: True)):
        with pytest.raises(ApiError, match="shutting down") as error:
            refused.result(5)
        assert error.value.status == 503
    release.set()
    assert first.result(5)
    assert second.result(5)


def test_a_cancelled_caller_goes_on_when_the_work_has_ended(threads: FairThreads) -> None:
    began, done = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        time.sleep(0.2)
        done.set()

    async def run() -> None:
        task = asyncio.ensure_future(threads.run("a", work))
        await asyncio.to_thread(began.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()

    asyncio.run(run())
