"""Threads that tenants share: who has much to do delays nobody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

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


def test_work_for_which_no_thread_starts_is_done_once_by_one_that_is_there(
    threads: FairThreads, fail_to_start: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    release, done = threading.Event(), list[int]()
    first = threads.submit("a", lambda: release.wait(20))
    fail_to_start(1)
    second = threads.submit("a", partial(done.append, 1))
    assert not second.done()
    release.set()
    assert first.result(5)
    second.result(5)
    assert done == [1]
    assert [record.message for record in caplog.records] == ["no_thread"]
    all_at_once(threads)


def test_one_thread_does_all_that_waits_in_turns_where_no_other_starts(
    threads: FairThreads, fail_to_start: Callable[[int], None]
) -> None:
    release, done = threading.Event(), list[str]()
    first = threads.submit("a", lambda: release.wait(20))
    fail_to_start(99)
    waiting = [threads.submit(name, partial(done.append, name)) for name in ("a", "a", "a", "b", "c", "b")]
    release.set()
    assert first.result(5)
    for future in waiting:
        future.result(5)
    assert done == ["a", "b", "c", "a", "b", "a"]
    fail_to_start(0)
    all_at_once(threads)


def test_what_waits_for_a_thread_may_be_cancelled_or_is_refused_at_the_end(
    threads: FairThreads, fail_to_start: Callable[[int], None]
) -> None:
    release, done = threading.Event(), list[int]()
    first = threads.submit("a", lambda: release.wait(20))
    fail_to_start(99)
    cancelled, refused = (threads.submit("a", partial(done.append, number)) for number in range(2))
    assert cancelled.cancel()
    threads.close()
    with pytest.raises(ApiError, match="shutting down"):
        refused.result(5)
    release.set()
    assert first.result(5)
    assert done == []


def test_one_after_another_is_done_by_the_one_thread_that_is_there(
    threads: FairThreads, fail_to_start: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Future.set_result

    def set_slowly(future: Future[Any], value: Any) -> None:
        result(future, value)
        # Who waits for this asks for the next before the thread is idle.
        time.sleep(0.01)

    assert threads.submit("a", lambda: -1).result(5) == -1
    fail_to_start(10**6)
    monkeypatch.setattr(Future, "set_result", set_slowly)
    for number in range(100):
        assert threads.submit(f"tenant {number % 3}", partial(int, number)).result(5) == number


def test_an_idle_thread_keeps_nothing_of_what_it_did(threads: FairThreads) -> None:
    class Thing:
        pass

    def is_gone(of: weakref.ref[Thing]) -> bool:
        return of() is None

    for _ in range(2):
        thing = Thing()
        known = weakref.ref(thing)
        threads.submit("a", partial(id, thing)).result(5)
        del thing
        end = time.monotonic() + 5
        while not is_gone(known):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_threads_end_when_they_are_closed() -> None:
    made, release = FairThreads(4, "closed"), threading.Event()
    made.submit("a", lambda: 1).result(5)
    last = made.submit("a", lambda: release.wait(20))
    made.close()
    assert any(thread.name.startswith("closed") for thread in threading.enumerate())
    release.set()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("closed") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert last.result(0)
    assert not any(thread.name.startswith("closed") for thread in threading.enumerate())


def test_the_program_ends_when_what_runs_has_ended() -> None:
    code = (
        "import time; from prefixtune.server.threads import FairThreads; threads = FairThreads(2, 'test');"
        "[threads.submit('a', lambda: (time.sleep(0.5), print('done', flush=True))) for _ in range(2)]"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


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
