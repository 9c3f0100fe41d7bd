"""The data folder of jobs: what lies where.

    files/file-.../            an uploaded file: `data.jsonl` (or another ending), `meta.json`
    jobs/ftjob-.../            a job: its events, its run and, until it has ended, its inputs
    workers/NAME.lock          held by a worker as long as it lives
    jobs.sqlite                the queue, where no other database is named

A job's inputs are its own links to the files that it reads: they stay when their owner deletes the uploads, which never
change. The prefix that training goes on from may be overwritten in its place, and so it is copied. A file's name says
what it is for, and its ending how it is read: `train.jsonl`, `dev.csv`, `document.md`, `questions.tsv`,
`start.NAME.safetensors`.

Several machines that serve and train share this folder and the folder of prefixes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from prefixtune.utils.files import fsync, reporting_write_errors, work_folder
from prefixtune.utils.locks import acquire_lock

InputName = Literal["train", "dev", "document", "questions", "start"]
_FILE_ID, _JOB_ID = re.compile(r"file-[0-9a-f]{24}"), re.compile(r"ftjob-[0-9a-f]{24}")


def is_file_id(text: str) -> bool:
    """Whether this may be the id of a file, and so a part of a path."""
    return _FILE_ID.fullmatch(text) is not None


def is_job_id(text: str) -> bool:
    """Whether this may be the id of a job, and so a part of a path."""
    return _JOB_ID.fullmatch(text) is not None


class JobFolder:
    """The files of a job.

    Args:
        root: Its folder.

    Attributes:
        inputs: What it reads, until it has ended.
        run: The run's folder, as `prefixtune train --output` makes it.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.inputs, self.run = root, root / "inputs", root / "run"

    def find_input(self, name: InputName) -> Path | None:
        """The file of that name, whatever its ending; None: the job has none."""
        return next(self.inputs.glob(f"{name}.*"), None)

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Keep the job to oneself while the block runs; yields whether nobody else has it.

        Raises:
            OSError: There is no such folder, or it cannot be written.
        """
        # The lock's file is not deleted: another process may have it open.
        lock = acquire_lock(self.root / ".lock", 0.0)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()


class DataFolder:
    """Paths in a data folder; nothing is made by asking for one.

    Args:
        root: The folder.

    Attributes:
        files: The folders of uploaded files, and of results.
        jobs: The folders of all jobs.
        workers: The locks of workers.
        database: The queue, where no other database is named.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.files, self.jobs = root, root / "files", root / "jobs"
        self.workers, self.database = root / "workers", root / "jobs.sqlite"

    def job(self, job_id: str) -> JobFolder:
        """The folder of a job.

        Raises:
            ValueError: That is no id of a job.
        """
        if not is_job_id(job_id):
            raise ValueError(f"{job_id[:64]!r} is no id of a job")
        return JobFolder(self.jobs / job_id)

    def make_job(self, job_id: str, inputs: Mapping[InputName, tuple[Path, str]]) -> JobFolder:
        """Make the folder of a job with its inputs: all of it, or nothing. One that is there already stays.

        Args:
            job_id: Whose.
            inputs: Name -> the file, and the ending of its name, as in `.jsonl`.

        Raises:
            PrefixError: A file is gone, or the folder cannot be written.
        """
        folder = self.job(job_id)
        with reporting_write_errors(self.jobs):
            self.jobs.mkdir(parents=True, exist_ok=True)
            with work_folder(self.jobs, "new") as made:
                new = JobFolder(made)
                new.inputs.mkdir()
                for name, (source, ending) in inputs.items():
                    _put(source, new.inputs / f"{name}{ending}", copy=name == "start")
                fsync(new.inputs)
                if not folder.root.exists():
                    os.rename(made, folder.root)
                    fsync(self.jobs)
        return folder


def _put(source: Path, path: Path, *, copy: bool) -> None:
    """A second name of a file (of a symbolic link's file, not of the link) or, on another disk, a copy."""
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source.resolve(), path)
            return
    shutil.copyfile(source, path)
    fsync(path)
