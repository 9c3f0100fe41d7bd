"""Threads that tenants share: who has much to do delays nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture
def fail_to_start(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`fail_to_start(count)`: the system refuses the next threads of the pool."""
    start, left = threading.Thread.start, [0]

    def start_or_fail(thread: threading.Thread) -> None:
        if left[0] and thread.name.startswith("test"):
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    def fail(count: int) -> None:
        left[0] = count

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    return fail


def all_at_once(threads: FairThreads) -> None:
    """Use all four threads."""
    barrier = threading.Barrier(4)
    futures = [threads.submit(name, lambda: barrier.wait(10)) for name in ("x", "x", "y", "y")]
    assert sorted(future.result(10) for future in futures) == [0, 1, 2, 3]


def test_threads_that_do_not_start_disable_nothing(threads: FairThreads, fail_to_start: Callable[[int], None]) -> None:
    done = list[int]()
    fail_to_start(6)
    for number in range(6):
        with pytest.raises(ApiError, match="can start no thread") as error:
            threads.submit("a", partial(done.append, number)).result(5)
        assert (error.value.status, error.value.code) == (503, "busy")
    all_at_once(threads)
    assert done == []


def test_refused_work_is_not_done_by_a_thread_that_is_there(
    threads: FairThreads, fail_to_start: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    release, done, pool = threading.Event(), list[int](), threads._threads
    first = threads.submit("a", lambda: release.wait(20))
    fail_to_start(1)
    refused = threads.submit("a", partial(done.append, 1))
    with pytest.raises(ApiError, match="can start no thread"):
        refused.result(5)
    release.set()
    assert first.result(5)
    pool.shutdown(wait=True)
    assert done == []
    assert [record.message for record in caplog.records] == ["no_thread"]
    all_at_once(threads)


def test_work_that_waits_for_a_thread_which_does_not_start_ends(
    threads: FairThreads, fail_to_start: Callable[[int], None]
) -> None:
    release = threading.Event()
    first, second = (threads.submit("a", lambda: release.wait(20)) for _ in range(2))
    waiting = [threads.submit("a", lambda: True) for _ in range(3)]
    fail_to_start(99)
    release.set()
    assert first.result(5)
    assert second.result(5)
    for future in waiting:
        error = future.exception(5)
        assert error is None or (isinstance(error, ApiError) and error.code == "busy")
    fail_to_start(0)
    all_at_once(threads)


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
