"""What a worker does besides training: a job that cannot go on is paused."""

from __future__ import annotations

from typing import Any

import pytest

from prefixtune.jobs import worker
from prefixtune.jobs.executor import ClaimLostError, JobPausedError
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from training_jobs import make_job


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
