"""The queue of jobs and a worker's side of it: who is claimed next, what a job leaves, what stops it for good."""

import errno
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from dbos import PortableWorkflowError
from filelock import FileLock

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs import queue as queue_module
from prefixtune.jobs import worker as worker_module
from prefixtune.jobs.config import WorkerConfig
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobError
from prefixtune.jobs.queue import JobQueue
from prefixtune.jobs.trainer import LeftError
from prefixtune.jobs.worker import launch, look_after, run_worker
from prefixtune.utils.locks import file_lock
from training_jobs import new_job_id, wait_for, wait_until

NAME = "tests-1"


class Worker:
    """Claims jobs, which end when the test says so."""

    def __init__(self):
        self.started = []
        self.steps = []
        self._changed = threading.Condition()
        self._ends = {}

    def run(self, job, step):
        with self._changed:
            self.started.append(job.id)
            self._changed.wait_for(lambda: job.id in self._ends, 60)
            how = self._ends.pop(job.id)
        if how is None:
            raise LeftError
        step("train", lambda: self.steps.append(job.id))
        step("publish", lambda: how(job))

    def leave(self, job):
        """Notice that a job was stopped."""
        self._end(job, None)

    def end(self, job, how=lambda job: None):
        self._end(job, how)

    def _end(self, job, how):
        with self._changed:
            self._ends[job.id] = how
            self._changed.notify_all()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a database with its tables."""
    made = f"sqlite:///{tmp_path_factory.mktemp('queue') / 'jobs.sqlite'}"
    JobQueue(made).close()
    return made


@pytest.fixture(scope="module")
def worker(url):
    # One for the module: a process has only one.
    made = Worker()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker_module, "_POLLING_SECONDS", 0.05)
        with launch(url, NAME, "b1", made.run):
            yield made


@pytest.fixture
def queue(url):
    made = JobQueue(url)
    yield made
    for state in list(made.iterate()):
        made.cancel(state.job.id)
    made.close()


@pytest.fixture
def add(queue, request):
    """A function that queues a job, which ends with the test."""
    jobs = []

    def make(owner="ann", **fields):
        job_id = new_job_id()
        named = {"id": job_id, "name": job_id, "owner": owner, "model": "m", "training_file": "file-1", "created": 1}
        jobs.append(Job(**{**named, "backbone": "b1", **fields}))
        queue.add(jobs[-1])
        return jobs[-1]

    yield make
    for job in jobs:
        queue.cancel(job.id)
        if "worker" in request.fixturenames:
            request.getfixturevalue("worker").leave(job)


def has_begun(worker, job, times=1):
    return worker.started.count(job.id) >= times


def wait_for_start(worker, job):
    wait_until(lambda: has_begun(worker, job), 20)


# --- without a worker -------------------------------------------------------------------------------------------------


def test_a_job_is_found_as_it_was_added(queue, add):
    job = add(metadata={"a": "é"}, config={"learning_rate": 0.5, "kinds": ["fact"]}, backbone="b2")
    assert queue.get(job.id).job == job
    assert queue.get(job.id).status == "queued"
    assert (queue.has_work("b2"), queue.has_work("b3")) == (True, False)
    # The same job again is no second one.
    queue.add(job)
    assert [state.job.id for state in queue.iterate("ann")] == [job.id]
    assert [*queue.iterate("bob")] == []
    with pytest.raises(RequestError):
        queue.get(new_job_id())


def test_pausing_resuming_and_cancelling(queue, add):
    job = add(backbone="b2")
    assert queue.pause(job.id).status == "paused"
    assert [(one.job.name, one.status) for one in queue.unfinished()] == [(job.name, "paused")]
    assert not queue.has_work("b2")
    assert queue.resume(job.id).status == "queued"
    assert queue.has_work("b2")
    queue.pause(job.id)
    ended = queue.cancel(job.id)
    assert ended.status == "cancelled"
    assert ended.finished is not None
    for again in (queue.pause, queue.resume, queue.cancel):
        assert again(job.id).status == "cancelled"
    assert queue.unfinished() == []


def test_looking_reads_what_is_asked_for_and_no_more(queue, add, monkeypatch):
    read, owner = [], new_job_id()
    list_workflows = queue._client.list_workflows

    def count(**query):
        found = list_workflows(**query)
        read.extend((one.workflow_id, one.input is not None) for one in found)
        return found

    jobs = [add(owner, backbone="b4") for _ in range(9)]
    for job in jobs[:4]:
        queue.cancel(job.id)
    queue.pause(jobs[4].id)
    monkeypatch.setattr(queue._client, "list_workflows", count)
    ids = [job.id for job in jobs]
    assert queue.waiting("b4") == ids[5:]
    assert read == [(one, False) for one in ids[5:]]
    read.clear()
    assert [state.job.id for state in queue.unfinished()] == ids[4:]
    assert sorted(one for one, has_input in read if has_input) == sorted(ids[4:])
    monkeypatch.setattr(queue_module, "_PAGE", 4)
    # All were made within a second, which is as exact as SQLite is.
    found = [state.job.id for state in queue.iterate(owner)]
    assert found == ids[::-1]
    for place, one in enumerate(found):
        assert [state.job.id for state in queue.iterate(owner, one)] == found[place + 1 :]
    read.clear()
    assert next(queue.iterate(owner)).job.id == found[0]
    assert len(read) == 4
    for wrong in ((owner, new_job_id()), ("bob", ids[0])):
        read.clear()
        with pytest.raises(RequestError):
            list(queue.iterate(*wrong))
        assert read == []


def test_of_many_changes_at_once_a_cancellation_wins(queue, add):
    for _ in range(3):
        job, start = add(backbone="b2"), threading.Barrier(4)

        def change(number, job_id=job.id, start=start):
            start.wait(10)
            for action in ([queue.cancel], [queue.pause, queue.resume] * 4)[number > 0]:
                action(job_id)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(change, range(4)))
        assert queue.get(job.id).status == "cancelled"


def test_two_workers_have_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_PATIENCE", 0.1)
    config = WorkerConfig(name="mine", data_folder=str(tmp_path), prefixes=str(tmp_path), backbone=str(tmp_path / "x"))
    with file_lock(tmp_path / ".mine.lock"), pytest.raises(PrefixError, match="'mine'"):
        run_worker(config, threading.Event())
    # Now it has the name, and goes on to the backbone, which there is not.
    with pytest.raises(PrefixError) as missing:
        run_worker(config, threading.Event())
    assert "'mine'" not in str(missing.value)
    assert not (tmp_path / ".mine.lock").exists()


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("lock", [lambda *_: FileLock("any"), no_locks], ids=["held by all", "none"])
def test_a_disk_without_locks_is_refused_at_the_start(lock, tmp_path, monkeypatch):
    """Two workers would train the same job there, each with a lock that it takes to be its own."""
    config = WorkerConfig(backbone=str(tmp_path / "none"), prefixes=str(tmp_path), data_folder=str(tmp_path))
    with pytest.raises(PrefixError) as missing:
        run_worker(config, threading.Event())
    assert str(tmp_path / "none") in str(missing.value)
    assert not list(tmp_path.rglob("*.lock"))
    monkeypatch.setattr("prefixtune.utils.locks.acquire_lock", lock)
    with pytest.raises(PrefixError) as refused:
        run_worker(config, threading.Event())
    assert str(tmp_path / "jobs") in str(refused.value)


# --- with a worker ----------------------------------------------------------------------------------------------------


def test_one_owners_many_jobs_do_not_hold_up_anothers_first(queue, worker, add):
    first = add("ann")
    wait_for_start(worker, first)
    many, other = [add("ann") for _ in range(12)], add("bob")
    count = len(worker.started)
    running = first
    while not has_begun(worker, other):
        worker.end(running)
        wait_until(lambda count=count: len(worker.started) > count, 20)
        count = len(worker.started)
        running = next(job for job in (*many, other) if job.id == worker.started[-1])
    # By chance each time: that all twelve come first happens once in 4,096 times.
    assert sum(has_begun(worker, job) for job in many) < 12


def test_success_and_a_failure_are_stored(queue, worker, add):
    job = add()
    wait_for_start(worker, job)
    assert (queue.get(job.id).status, queue.get(job.id).worker) == ("running", NAME)
    assert queue.states([job.id, new_job_id()]) == {job.id: queue.get(job.id)}
    worker.end(job)
    state = wait_for(queue, job, "succeeded")
    assert (state.worker, state.error) == ("", None)
    assert state.finished is not None
    assert abs(state.finished - time.time()) < 60
    assert queue.cancel(job.id).status == "succeeded"

    error = JobError(code="invalid_training_file", message="row 7 is “wrong”.", param="training_file")

    def fail(job):
        raise PortableWorkflowError(error.message, "JobFailedError", error.code, error.model_dump())

    job = add()
    wait_for_start(worker, job)
    worker.end(job, fail)
    assert wait_for(queue, job, "failed").error == error


def test_a_job_that_is_paused_and_resumed_many_times_stops_neither_its_worker_nor_others(queue, worker, add):
    job = add("ann")
    for number in range(1, 6):
        wait_until(functools.partial(has_begun, worker, job, number), 20)
        # Resumed before the worker notices: the old claim ends while the job waits or runs.
        queue.pause(job.id)
        queue.resume(job.id)
        worker.leave(job)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("dbos-executor")]
    assert len(threads) < 5
    wait_until(functools.partial(has_begun, worker, job, 6), 20)
    queue.pause(job.id)
    worker.leave(job)
    other = add("bob")
    wait_for_start(worker, other)
    worker.end(other)
    wait_for(queue, other, "succeeded")


def test_jobs_of_another_version_or_backbone_are_left_to_other_workers(queue, worker, add, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(queue_module, "PROTOCOL", "other")
        others = [add(), add(backbone="b2")]
    # Neither are they claimed when they are resumed.
    for other in others:
        queue.pause(other.id)
        queue.resume(other.id)
    job = add()
    wait_for_start(worker, job)
    worker.end(job)
    wait_for(queue, job, "succeeded")
    assert [queue.get(other.id).status for other in others] == ["queued", "queued"]


def test_what_a_dead_worker_had_is_queued_again(queue, worker, add, tmp_path, monkeypatch):
    data = DataFolder(tmp_path)
    data.make()
    job = add()
    wait_for_start(worker, job)
    data.job(job.id).inputs.mkdir(parents=True)
    look = functools.partial(look_after, data, queue, "b1", tmp_path / "prefixes", worker="tests-2")
    with data.job(job.id).hold():
        # Somebody trains it.
        look()
    # Its own worker knows; others have no such backbone.
    look(worker=NAME)
    look_after(data, queue, "b2", tmp_path / "prefixes")
    assert queue.get(job.id).status == "running"
    assert not has_begun(worker, job, 2)
    look()
    worker.leave(job)
    wait_until(functools.partial(has_begun, worker, job, 2), 20)
    # After the first look.
    monkeypatch.setattr(queue, "states", lambda ids: monkeypatch.undo() or [queue.states(ids), queue.pause(job.id)][0])
    look()
    assert queue.get(job.id).status == "paused", "by its owner, in between"
    queue.resume(job.id)
    worker.leave(job)
    wait_until(functools.partial(has_begun, worker, job, 3), 20)
    worker.end(job)
    wait_for(queue, job, "succeeded")
