"""How often a job was begun without getting any further: one that kills its worker each time must end."""

from __future__ import annotations

import json

from prefixtune.jobs.executor import JobFailedError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import JobError
from prefixtune.utils.files import write_text

__all__ = ["MAX_ATTEMPTS", "count_attempt", "forget_attempts"]


MAX_ATTEMPTS = 10
_FILE = "attempts.json"


def count_attempt(folder: JobFolder) -> None:
    """Note that a worker begins, before it does anything that may kill it.

    Raises:
        JobFailedError: Too many have begun since the job last got any further.
        PrefixError: It cannot be noted.
    """
    path = folder.root / _FILE
    try:
        count = int(json.loads(path.read_bytes()[:100])["attempts"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        count = 0
    if count >= MAX_ATTEMPTS:
        message = (
            f"{count} workers in a row ended unexpectedly while they trained this job, such as for lack of memory."
        )
        raise JobFailedError(JobError(code="worker_died", message=message))
    write_text(path, json.dumps({"attempts": count + 1}))


def forget_attempts(folder: JobFolder) -> None:
    """Count again from 0: the job got further, or its worker left it in good order."""
    (folder.root / _FILE).unlink(missing_ok=True)
