"""What is kept of jobs that have ended."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from prefixtune.jobs.active import hold_folder
from prefixtune.jobs.checkpoints import FOLDER
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.files import FileStore, result_file_id
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.inputs import find_input
from prefixtune.jobs.job import Job
from prefixtune.jobs.queue import JobQueue
from prefixtune.jobs.retention import clear_ended, forget_oldest
from prefixtune.training.folder import EVENTS_FILE, PREFIX_FILE, STATE_FILE
from training_jobs import make_job


def begun(data: DataFolder, queue: JobQueue, name: str, owner: str = "ann") -> Job:
    """A queued job that has left what a worker leaves."""
    job = make_job(data, name, owner=owner)
    queue.add(job)
    run = data.job(job.id).run
    (run / FOLDER).mkdir(parents=True)
    for path in (EVENTS_FILE, STATE_FILE, PREFIX_FILE, "teacher.safetensors", f"{FOLDER}/step-1.safetensors"):
        (run / path).write_text("x")
    JobEvents(data.job(job.id)).add("Training has started.")
    return job


def succeed(data: DataFolder, job: Job) -> None:
    """End a job without a worker."""
    output = f'{{"name": "{job.name}", "trained_tokens": 1, "steps": 1}}'
    engine = sa.create_engine(data.database_url)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE workflow_status SET status = 'SUCCESS', output = :output WHERE workflow_uuid = :id"),
            {"output": output, "id": job.id},
        )
    engine.dispose()


def left(data: DataFolder, job: Job) -> set[str]:
    root: Path = data.job(job.id).root
    # The lock of the folder itself may stay; nobody holds it.
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {".lock"}


def test_jobs_that_have_ended_keep_neither_inputs_nor_states(data: DataFolder, queue: JobQueue) -> None:
    names = ("queued", "paused", "cancelled", "succeeded", "held")
    queued, paused, cancelled, succeeded, held = (begun(data, queue, name) for name in names)
    queue.pause(paused.id)
    queue.cancel(cancelled.id)
    queue.cancel(held.id)
    succeed(data, succeeded)
    unknown = make_job(data, "unknown")
    whole = left(data, queued)
    # As of a worker that was killed.
    data.job(cancelled.id).run.joinpath(".lock").touch()

    with hold_folder(data.job(held.id)):
        # A worker still saves there.
        assert set(clear_ended(data, queue)) == {cancelled.id, succeeded.id}
    assert left(data, cancelled) == {"events.jsonl", f"run/{EVENTS_FILE}"}
    assert left(data, succeeded) == {"events.jsonl", f"run/{EVENTS_FILE}", f"run/{FOLDER}/step-1.safetensors"}
    assert left(data, paused) == left(data, held) == whole
    assert find_input(data.job(unknown.id), "train") is not None
    assert clear_ended(data, queue) == [held.id]
    assert clear_ended(data, queue) == []


def test_the_oldest_jobs_of_an_owner_that_have_ended_are_deleted(data: DataFolder, queue: JobQueue) -> None:
    files = FileStore(data)
    jobs = [begun(data, queue, f"old-{number}", "bob") for number in range(4)]
    other = begun(data, queue, "others", "eve")
    for job in (*jobs[1:], other):
        queue.cancel(job.id)
    for job in jobs[1:3]:
        files.put_result("bob", result_file_id(job.id), "step_metrics.csv", b"step\n")

    assert forget_oldest(data, queue, files, 100) == []
    assert forget_oldest(data, queue, files, 2) == [jobs[1].id]
    assert forget_oldest(data, queue, files, 1) == [jobs[2].id]
    # One that has not ended is the oldest, and stays.
    assert [state.job.id for state in queue.iterate("bob")] == [jobs[3].id, jobs[0].id]
    assert [state.job.id for state in queue.iterate("eve")] == [other.id]
    assert [data.job(job.id).root.exists() for job in jobs] == [True, False, False, True]
    assert files.list("bob") == []
