"""What a worker does besides training: it waits for its database, and removes what kills have left."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prefixtune.jobs import worker
from prefixtune.jobs.config import WorkerConfig
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.executor import ClaimLostError, JobPausedError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, migrate
from prefixtune.jobs.retention import sweep
from prefixtune.jobs.worker import run_worker
from training_jobs import make_job


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
        raise JobPausedError("full")

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
