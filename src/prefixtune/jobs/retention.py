"""What is kept of jobs that have ended: events and figures, the checkpoints of results, and not too many of all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter

from prefixtune.errors import PrefixError
from prefixtune.jobs.active import hold_folder
from prefixtune.jobs.checkpoints import remove_checkpoints
from prefixtune.jobs.files import FileStore, UnknownFileError, result_file_id
from prefixtune.jobs.folder import DataFolder, JobFolder, is_job_id
from prefixtune.jobs.inputs import remove_job_folder
from prefixtune.jobs.job import ENDED, Job, JobStatus
from prefixtune.jobs.queue import JobQueue
from prefixtune.prefix.folder import ENDING
from prefixtune.utils.files import claim_folder

__all__ = ["clear_ended", "clear_folder", "forget_oldest"]


def clear_ended(data: DataFolder, jobs: JobQueue) -> list[str]:
    """Remove what jobs that have ended need no more; returns their ids.

    Raises:
        QueueUnavailableError: The database cannot be reached.
    """
    with_inputs: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        with_inputs = [one for one in os.listdir(data.jobs) if is_job_id(one) and data.job(one).inputs.exists()]
    statuses = jobs.statuses(with_inputs)
    return [job_id for job_id, status in statuses.items() if status in ENDED and clear_folder(data.job(job_id), status)]


def clear_folder(folder: JobFolder, status: JobStatus) -> bool:
    """Remove the inputs and states of a job that has ended and, without a result, its checkpoints.

    Args:
        folder: The job's.
        status: How it ended.

    Returns:
        Whether it is done; if not, somebody still has the folder, or it cannot be written.
    """
    with contextlib.suppress(OSError, PrefixError), hold_folder(folder) as held:
        if held:
            # A claim that a killed worker left ends with this one.
            if folder.run.exists():
                with claim_folder(folder.run):
                    pass
            # States, what a teacher said, and the prefix, which is published.
            for path in folder.run.glob(f"*{ENDING}"):
                path.unlink(missing_ok=True)
            if status != "succeeded":
                remove_checkpoints(folder)
            # Last: whoever has no inputs is not looked at again.
            if folder.inputs.exists():
                shutil.rmtree(folder.inputs)
            return True
    return False


def forget_oldest(data: DataFolder, jobs: JobQueue, files: FileStore, keep: int) -> list[str]:
    """Delete the oldest jobs of owners with too many that have ended, with their metrics; models stay.

    Args:
        data: Where their folders are.
        jobs: All jobs.
        files: Where their metrics are.
        keep: Most jobs of an owner that have ended.

    Returns:
        The ids of those that are gone.

    Raises:
        QueueUnavailableError: The database cannot be reached.
    """
    ended, oldest = Counter[str](), list[Job]()
    for state in jobs.iterate():
        job = state.job
        if state.status in ENDED:
            ended[job.owner] += 1
            if ended[job.owner] > keep:
                oldest.append(job)
    for job in oldest:
        # The job itself comes last: after a kill in between it is deleted again.
        remove_job_folder(data, job.id)
        with contextlib.suppress(UnknownFileError, OSError):
            files.delete(job.owner, result_file_id(job.id))
        jobs.delete(job.id)
    return [job.id for job in oldest]
