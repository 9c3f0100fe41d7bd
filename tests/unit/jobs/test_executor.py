"""A worker's side of the queue: who is claimed next, what a job leaves, and which jobs are not for this worker."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixtune.jobs import executor as executor_module
from prefixtune.jobs import queue as queue_module
from prefixtune.jobs.executor import ClaimLostError, Executor, JobFailedError
from prefixtune.jobs.job import Job, JobError, JobResult, new_job_id
from prefixtune.jobs.queue import JobQueue
from training_jobs import wait_for, wait_until


class Worker:
    """An executor whose jobs end when the test says so."""

    def __init__(self, url: str, locks: Path) -> None:
        self.started: list[str] = []
        self.ending: dict[str, Callable[[Job], JobResult]] = {}
        self._changed = threading.Condition()
        self.executor = Executor(url, locks, backbone="b1", run=self._run, name="tests")
        self._tokens: dict[str, str] = {}

    def _run(self, job: Job, token: str) -> JobResult:
        with self._changed:
            self.started.append(job.id)
            self._tokens[job.id] = token
            self._changed.wait_for(lambda: job.id in self.ending or self._tokens[job.id] != token, 60)
        if self._tokens[job.id] != token:
            raise ClaimLostError
        return self.ending[job.id](job)

    def leave(self, job: Job) -> None:
        """Notice that a job was stopped."""
        with self._changed:
            self._tokens[job.id] = ""
            self._changed.notify_all()

    def end(self, job: Job, how: Callable[[Job], JobResult] | None = None) -> None:
        with self._changed:
            self.ending[job.id] = how or (lambda job: JobResult(name=job.name, trained_tokens=1, steps=1))
            self._changed.notify_all()


@pytest.fixture(scope="module")
def worker(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    # One for the module: a process has only one.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(executor_module, "_POLLING_SECONDS", 0.05)
        made = Worker(url, tmp_path_factory.mktemp("locks"))
        made.executor.start()
        yield made
        made.executor.stop()


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    made = JobQueue(url)
    yield made
    made.close()


@pytest.fixture
def add(queue: JobQueue, worker: Worker) -> Iterator[Callable[..., Job]]:
    """A function that queues a job, which ends with the test."""
    jobs: list[Job] = []

    def make(owner: str = "ann", **fields: Any) -> Job:
        job_id = new_job_id()
        job = Job(
            id=job_id,
            owner=owner,
            created=1,
            model="m",
            name=job_id,
            training_file="file-1",
            **{"backbone": "b1", **fields},
        )
        jobs.append(job)
        queue.add(job)
        return job

    yield make
    for job in jobs:
        queue.cancel(job.id)
        worker.end(job)


def wait_for_start(worker: Worker, job: Job) -> None:
    wait_until(lambda: job.id in worker.started)


def has_begun(worker: Worker, job: Job, times: int) -> bool:
    return worker.started.count(job.id) == times


def has_started_more(worker: Worker, count: int) -> bool:
    return len(worker.started) > count


def test_owners_take_turns(queue: JobQueue, worker: Worker, add: Callable[..., Job]) -> None:
    first = add("ann")
    wait_for_start(worker, first)
    others = [add("ann"), add("ann"), add("bob"), add("bob"), add("eve")]
    order = []
    for _ in others:
        count = len(worker.started)
        worker.end(next(job for job in (first, *others) if job.id == worker.started[-1]))
        wait_until(functools.partial(has_started_more, worker, count))
        order.append(next(job.owner for job in others if job.id == worker.started[-1]))
    # Ann's second job comes after the first ones of those who came later.
    assert sorted(order[:2]) == ["bob", "eve"]
    assert sorted(order[2:4]) == ["ann", "bob"]
    assert order[4] == "ann"


def test_a_result_is_stored(queue: JobQueue, worker: Worker, add: Callable[..., Job]) -> None:
    job = add(metadata={"a": "é"}, config={"learning_rate": 0.5, "kinds": ["fact"]})
    wait_for_start(worker, job)
    state = queue.get(job.id)
    assert (state.status, state.worker, state.job) == ("running", worker.executor.name, job)
    assert worker.executor.name.startswith("worker-tests-")
    left = JobResult(name=job.name, trained_tokens=7, steps=2, result_files=["file-2"], best_loss=0.5)
    worker.end(job, lambda job: left)
    state = wait_for(queue, job, "succeeded")
    assert state.result == left
    assert state.finished is not None
    assert abs(state.finished - time.time()) < 60
    assert state.worker == ""


def test_a_failure_is_stored_as_its_owner_may_read_it(queue: JobQueue, worker: Worker, add: Callable[..., Job]) -> None:
    error = JobError(code="invalid_training_file", message="row 7 is “wrong”.", param="training_file")

    def fail(job: Job) -> JobResult:
        raise JobFailedError(error)

    job = add()
    wait_for_start(worker, job)
    worker.end(job, fail)
    assert wait_for(queue, job, "failed").error == error


@pytest.mark.parametrize("stop", ["pause", "cancel"])
def test_what_a_stopped_job_leaves_is_not_heeded(
    queue: JobQueue, worker: Worker, add: Callable[..., Job], stop: str
) -> None:
    job, after = add(), add()
    wait_for_start(worker, job)
    status = getattr(queue, stop)(job.id).status
    assert status == {"pause": "paused", "cancel": "cancelled"}[stop]
    worker.end(job)
    # The next job starts when the stopped one's thread has ended.
    wait_for_start(worker, after)
    state = queue.get(job.id)
    assert (state.status, state.result) == (status, None)


def test_a_job_that_is_paused_and_resumed_many_times_stops_neither_its_worker_nor_others(
    queue: JobQueue, worker: Worker, add: Callable[..., Job]
) -> None:
    job = add("ann")
    for number in range(1, 9):
        wait_until(functools.partial(has_begun, worker, job, number))
        # Resumed before the worker notices: the old claim ends while the job waits or runs.
        queue.pause(job.id)
        queue.resume(job.id)
        worker.leave(job)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("dbos-executor")]
    for _ in range(50):
        queue.pause(job.id)
        queue.resume(job.id)
    worker.leave(job)
    queue.pause(job.id)
    worker.leave(job)
    other = add("bob")
    wait_for_start(worker, other)
    worker.end(other)
    wait_for(queue, other, "succeeded")
    worker.end(job)
    queue.resume(job.id)
    assert wait_for(queue, job, "succeeded").result is not None
    assert len(threads) < 5


def test_jobs_of_another_protocol_are_left_to_other_workers(
    queue: JobQueue, worker: Worker, add: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(queue_module, "PROTOCOL", "other")
        other = add()
    job = add()
    wait_for_start(worker, job)
    worker.end(job)
    wait_for(queue, job, "succeeded")
    assert queue.get(other.id).status == "queued"


def test_jobs_of_another_backbone_wait_for_its_workers(
    queue: JobQueue, worker: Worker, add: Callable[..., Job]
) -> None:
    other = add(backbone="b2")
    assert queue.has_work("b2")
    assert not queue.has_work("b3")
    # Neither is it claimed when it is resumed.
    queue.pause(other.id)
    assert not queue.has_work("b2")
    queue.resume(other.id)
    job = add()
    wait_for_start(worker, job)
    worker.end(job)
    wait_for(queue, job, "succeeded")
    assert queue.get(other.id).status == "queued"
    assert other.id not in worker.started
