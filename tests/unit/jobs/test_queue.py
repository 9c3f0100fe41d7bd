"""The queue of jobs: where a job stands changes in one statement, and one that has ended stays ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefixtune.errors import RequestError
from prefixtune.jobs import queue as queue_module
from prefixtune.jobs.executor import Executor
from prefixtune.jobs.job import Job, JobResult, new_job_id
from prefixtune.jobs.queue import JobQueue
from prefixtune.utils.locks import acquire_lock


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    made = JobQueue(url)
    yield made
    for state in made.iterate():
        made.cancel(state.job.id)
        made.delete(state.job.id)
    made.close()


def job(name: str = "one", owner: str = "ann") -> Job:
    return Job(
        id=new_job_id(), owner=owner, created=1, model="m", name=name, training_file="file-1", metadata={"a": "b"}
    )


def added(queue: JobQueue, name: str = "one", owner: str = "ann") -> str:
    made = job(name, owner)
    queue.add(made)
    return made.id


def test_a_job_is_found_as_it_was_added(queue: JobQueue) -> None:
    made = job()
    queue.add(made)
    state = queue.get(made.id)
    assert state.job == made
    assert state.status == "queued"
    assert [found.job.id for found in queue.iterate("ann") if found.job.name == "one"] == [made.id]
    assert [*queue.iterate("bob")] == []
    # The same job again is no second one.
    queue.add(made)
    assert len([*queue.iterate()]) == 1


def test_two_unfinished_jobs_cannot_have_one_name(queue: JobQueue) -> None:
    first = added(queue)
    with pytest.raises(RequestError, match="'one'"):
        added(queue, owner="bob")
    queue.cancel(first)
    added(queue, owner="bob")


def test_a_paused_job_is_resumed_and_keeps_its_name(queue: JobQueue) -> None:
    made = added(queue)
    assert queue.pause(made).status == "paused"
    assert sum(job.owner == "ann" for job in queue.unfinished()) == 1
    assert [state.status for state in queue.iterate() if state.job.name == "one"] == ["paused"]
    assert queue.resume(made).status == "queued"
    # Of no effect: it is not paused.
    assert queue.resume(made).status == "queued"


def test_of_two_jobs_that_wait_or_run_only_one_has_a_name_after_a_pause_too(queue: JobQueue) -> None:
    made = added(queue)
    queue.pause(made)
    queue.resume(made)
    with pytest.raises(RequestError, match="'one'"):
        added(queue, owner="bob")
    queue.pause(made)
    added(queue, owner="bob")
    with pytest.raises(RequestError, match="'one'"):
        queue.resume(made)
    assert queue.get(made).status == "paused"


def test_a_resumed_job_gets_the_turn_of_a_new_one(queue: JobQueue) -> None:
    early = added(queue, "early")
    queue.pause(early)
    others = [added(queue, f"ann-{number}") for number in range(3)]
    late = added(queue, "late", owner="bob")
    queue.resume(early)
    # Ann's own jobs came in the meantime; Bob's turn is that of Ann's first.
    assert [job.id for job in queue.unfinished()] == [others[0], late, *others[1:], early]
    # Nor does it wait behind all when those before it have gone.
    for one in others:
        queue.cancel(one)
    queue.pause(early)
    queue.resume(early)
    assert [job.id for job in queue.unfinished()] == [early, late]


def test_a_list_has_each_job_once_while_others_come_and_go(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "_PAGE", 3)
    ids = [added(queue, f"job-{number}") for number in range(10)]
    told: list[str] = []
    for state in queue.iterate():
        told.append(state.job.id)
        if len(told) == 3:
            added(queue, "new")
            added(queue, "newer")
        if len(told) == 6:
            for gone in told[:3]:
                queue.cancel(gone)
                queue.delete(gone)
    assert told == ids[::-1]


def test_a_job_that_a_newer_version_stored_is_listed(queue: JobQueue) -> None:
    class NewerJob(Job):
        priority: str = "high"

    newer = NewerJob(**job("newer").model_dump())
    queue.add(newer)
    added(queue, "older")
    assert {state.job.name for state in queue.iterate()} == {"newer", "older"}
    assert queue.get(newer.id).job == Job(**newer.model_dump())
    assert queue.cancel(newer.id).status == "cancelled"


def test_a_cancelled_job_stays_cancelled(queue: JobQueue) -> None:
    made = added(queue)
    queue.pause(made)
    ended = queue.cancel(made)
    assert ended.status == "cancelled"
    for again in (queue.pause, queue.resume, queue.cancel):
        assert again(made) == ended
    assert sum(job.owner == "ann" for job in queue.unfinished()) == 0


def test_of_many_changes_at_once_a_cancellation_wins(queue: JobQueue) -> None:
    for _ in range(5):
        made, start = added(queue), threading.Barrier(6)

        def change(number: int, made: str = made, start: threading.Barrier = start) -> None:
            start.wait(10)
            for action in ([queue.cancel], [queue.pause, queue.resume] * 4)[number > 0]:
                action(made)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(change, range(6)))
        assert queue.get(made).status == "cancelled"


def test_a_worker_takes_over_what_a_dead_one_left(queue: JobQueue, url: str, tmp_path: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def run(job: Job, token: str) -> JobResult:
        started.set()
        release.wait(10)
        return JobResult(name=job.name, trained_tokens=5, steps=2)

    locks = tmp_path / "workers"
    locks.mkdir()
    alive = acquire_lock(locks / "worker-alive.lock", 0.0)
    (locks / "worker-dead.lock").touch()
    executor = Executor(url, locks, backbone="", run=run)
    made = added(queue)
    executor.start()
    try:
        assert started.wait(20)
        assert queue.get(made).worker == executor.name
        # Its own job is none of a dead one's, and neither is a living worker's.
        assert executor.take_over(queue) == ["worker-dead"]
        assert sorted(path.stem for path in locks.iterdir()) == sorted(["worker-alive", executor.name])
        release.set()
        for _ in range(200):
            if queue.get(made).status == "succeeded":
                break
            threading.Event().wait(0.05)
        ended = queue.get(made)
        assert ended.result == JobResult(name="one", trained_tokens=5, steps=2)
        for again in (queue.pause, queue.resume, queue.cancel):
            assert again(made) == ended
    finally:
        release.set()
        executor.stop()
        if alive is not None:
            alive.release()
    assert [path.stem for path in locks.iterdir()] == ["worker-alive"]
