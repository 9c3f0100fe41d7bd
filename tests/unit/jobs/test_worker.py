"""What a worker does besides training: it waits for its database, and removes what kills have left."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from child_process import kill, start_child
from prefixtune.errors import ConfigError
from prefixtune.jobs import worker
from prefixtune.jobs.config import WorkerConfig
from prefixtune.jobs.database import claim_database, claim_folder
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.executor import ClaimLostError, JobPausedError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, migrate
from prefixtune.jobs.worker import run_worker, sweep
from training_jobs import make_job, wait_until


@pytest.fixture(autouse=True)
def _keep_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process of the tests is none to end first."""
    monkeypatch.setattr(worker, "_OOM_SCORE", tmp_path / "score")


def test_only_old_folders_that_nobody_has_queued_or_begun_are_removed(data: DataFolder, queue: JobQueue) -> None:
    queued, begun, old, new = (make_job(data, name) for name in ("queued", "begun", "old", "new"))
    queue.add(queued)
    JobEvents(data.job(begun.id)).add("Training has started.")
    (data.jobs / "notes").mkdir()
    for job in (queued, begun, old):
        os.utime(data.job(job.id).root, (0, time.time() - 4000))
    os.utime(data.jobs / "notes", (0, 0))

    assert sweep(data, queue) == [old.id]
    left = {path.name for path in data.jobs.iterdir()}
    assert left == {queued.id, begun.id, new.id, "notes"}


def test_without_jobs_there_is_nothing_to_sweep(data: DataFolder, queue: JobQueue) -> None:
    assert sweep(data, queue) == []


def test_a_database_that_starts_later_is_waited_for(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    def migrate_later(url: str) -> None:
        tries.append(url)
        if len(tries) < 3:
            raise QueueUnavailableError("the database of jobs cannot be reached.")
        migrate(url)

    monkeypatch.setattr(worker, "migrate", migrate_later)
    monkeypatch.setattr(worker, "_RETRY_SECONDS", 0.01)
    made = worker._open_queue(data.database_url, threading.Event())
    assert made is not None
    made.close()
    assert len(tries) == 3
    assert [record.message for record in caplog.records] == ["database_away"]

    monkeypatch.setattr(worker, "_DATABASE_SECONDS", 0.0)
    tries.clear()
    with pytest.raises(QueueUnavailableError):
        worker._open_queue(data.database_url, threading.Event())


def test_a_worker_that_is_to_end_waits_for_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataFolder
) -> None:
    def fail(url: str) -> None:
        raise QueueUnavailableError("the database of jobs cannot be reached.")

    monkeypatch.setattr(worker, "migrate", fail)
    stop = threading.Event()
    stop.set()
    config = WorkerConfig(data_folder=str(data.root), prefixes=str(tmp_path / "prefixes"), backbone=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    run_worker(config, stop)


def test_a_worker_of_another_database_leaves_the_data_folder_alone(tmp_path: Path, data: DataFolder) -> None:
    claim_folder(data, data.database_url)
    (tmp_path / "config.json").write_text("{}")
    url = f"sqlite:///{tmp_path / 'other.sqlite'}"
    with pytest.raises(ConfigError, match="another database"):
        run_worker(
            WorkerConfig(data_folder=str(data.root), database_url=url, backbone=str(tmp_path)), threading.Event()
        )
    assert not (tmp_path / "other.sqlite").exists()


def test_a_worker_with_another_data_folder_leaves_the_jobs_of_a_database_alone(
    tmp_path: Path, data: DataFolder, queue: JobQueue
) -> None:
    claim_database(data, queue)
    job = make_job(data)
    queue.add(job)
    (tmp_path / "config.json").write_text("{}")
    config = WorkerConfig(data_folder=str(tmp_path / "empty"), database_url=data.database_url, backbone=str(tmp_path))
    with pytest.raises(ConfigError, match="another data folder"):
        run_worker(config, threading.Event())
    assert queue.get(job.id).status == "queued"


@pytest.mark.parametrize("becomes", ["running", "cancelled", "another claim's", "deleted"])
def test_a_job_that_cannot_go_on_is_paused_once_the_database_answers(
    data: DataFolder, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    monkeypatch.setattr(worker, "_RETRY_SECONDS", 0.01)
    job = make_job(data)
    queue.add(job)
    row = queue._table.update().where(queue._table.c.workflow_uuid == job.id)

    def change(**values: Any) -> None:
        with queue._client._sys_db.engine.begin() as connection:
            connection.execute(row.values(**values))

    change(status="PENDING", owner_xid="token")
    looks: list[str] = []
    get = JobQueue.get

    def look(self: JobQueue, job_id: str) -> Any:
        looks.append(job_id)
        if len(looks) == 1:
            raise QueueUnavailableError("the database is away.")
        state = get(self, job_id)
        if len(looks) == 2:
            # Right after this look at the job, and before it is paused.
            if becomes == "cancelled":
                change(status="CANCELLED", owner_xid=None)
            elif becomes == "another claim's":
                change(owner_xid="other")
            elif becomes == "deleted":
                queue.delete(job_id)
        return state

    def run(job: Any, token: str) -> Any:
        raise JobPausedError

    with monkeypatch.context() as patched:
        patched.setattr(JobQueue, "get", look)
        with pytest.raises(ClaimLostError):
            worker._pausing(run, queue, job, "token")
    expected = {
        "running": ("paused", ""),
        "cancelled": ("cancelled", ""),
        "another claim's": ("running", "other"),
        "deleted": None,
    }
    assert queue.standings([job.id]).get(job.id) == expected[becomes]


def test_a_chore_that_fails_is_tried_again_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ended, calls = threading.Event(), {"bad": 0, "good": 0}

    def bad() -> None:
        calls["bad"] += 1
        raise ZeroDivisionError("a bug")

    def good() -> None:
        calls["good"] += 1

    thread = threading.Thread(target=worker._run_chores, args=([(0.0, bad), (0.0, good)], ended))
    thread.start()
    wait_until(lambda: min(calls.values()) > 1)
    ended.set()
    thread.join(10)
    assert [record.message for record in caplog.records] == ["chore_failed"]


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="needs Linux")
def test_a_worker_ends_before_its_server_where_memory_runs_out() -> None:
    child = start_child(
        "from prefixtune.jobs.config import WorkerConfig\n"
        "from prefixtune.jobs.worker import _lower_priority\n"
        "_lower_priority(WorkerConfig())\nprint('ready')\n"
        "print(open('/proc/self/oom_score_adj').read().strip(), flush=True)"
    )
    try:
        assert child.stdout is not None
        assert int(child.stdout.readline()) >= 500
    finally:
        kill(child)
