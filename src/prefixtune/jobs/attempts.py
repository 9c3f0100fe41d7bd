"""How often a job was begun without getting any further: one that kills its worker each time must end."""

from __future__ import annotations

import json

from prefixtune.jobs.executor import JobFailedError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import JobError
from prefixtune.utils.files import write_text

__all__ = ["MAX_ATTEMPTS", "SUSPICIOUS_ATTEMPTS", "count_attempt", "forget_attempts", "num_attempts"]


MAX_ATTEMPTS = 10
SUSPICIOUS_ATTEMPTS = 2
"""From then on it may be the job that kills its worker: it must not take others with it."""
_FILE = "attempts.json"


def num_attempts(folder: JobFolder) -> int:
    """How many workers have begun since the job last got any further."""
    try:
        with (folder.root / _FILE).open("rb") as file:
            return int(json.loads(file.read(100))["attempts"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0


def count_attempt(folder: JobFolder) -> None:
    """Note that a worker begins, before it does anything that may kill it.

    Raises:
        JobFailedError: Too many have begun since the job last got any further.
        PrefixError: It cannot be noted.
    """
    count = num_attempts(folder)
    if count >= MAX_ATTEMPTS:
        message = f"{count} workers in a row ended unexpectedly while they trained this job, as for lack of memory."
        raise JobFailedError(JobError(code="worker_died", message=message))
    write_text(folder.root / _FILE, json.dumps({"attempts": count + 1}))


def forget_attempts(folder: JobFolder) -> None:
    """Count again from 0: the job got further, or its worker left it in good order."""
    (folder.root / _FILE).unlink(missing_ok=True)
