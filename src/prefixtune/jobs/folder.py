"""The data folder of jobs: what lies where.

    files/OWNER/file-.../      an uploaded file: `data.jsonl` (or another ending), `meta.json`, `sample.json`
    jobs/ftjob-.../            a job: its events, its run and, until it has ended, its inputs
    workers/NAME.lock          held by a worker as long as it lives
    jobs.sqlite                the queue, where no other database is named

Several machines that serve and train share this folder and the folder of prefixes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DataFolder", "JobFolder", "is_file_id", "is_job_id"]

_FILE_ID, _JOB_ID = re.compile(r"file-[0-9a-f]{24}"), re.compile(r"ftjob-[0-9a-f]{24}")


def _digest(owner: str) -> str:
    """An owner's name as a part of a path: it may hold any characters."""
    return hashlib.sha256(owner.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def is_file_id(text: str) -> bool:
    """Whether this may be the id of a file, and so a part of a path."""
    return _FILE_ID.fullmatch(text) is not None


def is_job_id(text: str) -> bool:
    """Whether this may be the id of a job, and so a part of a path."""
    return _JOB_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class DataFolder:
    """Paths in a data folder; nothing is made by asking for one.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def database_url(self) -> str:
        """The queue's SQLite database."""
        return f"sqlite:///{self._database.absolute()}"

    @property
    def has_database(self) -> bool:
        """Whether somebody has made the queue's SQLite database."""
        return self._database.exists()

    @property
    def _database(self) -> Path:
        return self.root / "jobs.sqlite"

    @property
    def workers(self) -> Path:
        """The locks of workers."""
        return self.root / "workers"

    @property
    def owners(self) -> Path:
        """A folder for the files of each owner."""
        return self.root / "files"

    def files_of(self, owner: str) -> Path:
        """The folder of an owner's files."""
        return self.owners / _digest(owner)

    @property
    def jobs(self) -> Path:
        """The folders of all jobs."""
        return self.root / "jobs"

    def job(self, job_id: str) -> JobFolder:
        """The folder of a job.

        Raises:
            ValueError: That is no id of a job.
        """
        if not is_job_id(job_id):
            raise ValueError(f"{job_id[:64]!r} is no id of a job")
        return JobFolder(self.jobs / job_id)


@dataclass(frozen=True)
class JobFolder:
    """The files of a job.

    Attributes:
        root: Its folder.
    """

    root: Path

    @property
    def inputs(self) -> Path:
        """Links to the uploaded files, and a copy of the prefix to go on from.

        They stay until the job has ended, even if their owner deletes the files.
        """
        return self.root / "inputs"

    @property
    def run(self) -> Path:
        """The run's folder, as `prefixtune train --output` makes it."""
        return self.root / "run"

    @property
    def events(self) -> Path:
        """A JSON line for each event that its owner sees."""
        return self.root / "events.jsonl"

    @property
    def progress(self) -> Path:
        """How far it is: steps, loss, seconds left."""
        return self.root / "progress.json"
