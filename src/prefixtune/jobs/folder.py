"""The data folder of jobs: what lies where, and the events of a job.

    files/file-.../            an uploaded file: `data.jsonl` (or another ending), `meta.json`
    jobs/ftjob-.../            a job: its events, its run and, until it has ended, its inputs
    jobs.sqlite                the queue, where no other database is named

A job's inputs are its own links to the files that it reads: they stay when their owner deletes the uploads, which never
change. The prefix that training goes on from may be overwritten in its place, and so it is copied. A file's name is the
field of the configuration that names it, and its ending says how it is read: `train.jsonl`, `dev.csv`, `document.md`,
`questions.tsv`, `init_prefix.NAME.safetensors`.

What a job's owner sees while it runs is a log of events that only grows. Any number of processes may read it while one
writes. A line that a kill cut off is left out by readers, and ended before the next one is written. What is done again
after a kill is written again under the same id, and read once.

Several machines that serve and train share this folder and the folder of prefixes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from prefixtune.utils.files import append_line, atomic_files, fsync, reporting_write_errors
from prefixtune.utils.locks import acquire_lock

InputName = Literal["train", "dev", "document", "questions", "init_prefix"]
_LOG_BYTES, _TAIL_BYTES = 2**24, 2**16
"""Bytes of a log that are read, its last ones: for a list, and for the progress."""
EventLevel = Literal["info", "warn", "error"]
FILE_ID, JOB_ID = re.compile(r"file-[0-9a-f]{24}"), re.compile(r"ftjob-[0-9a-f]{24}")
"""What may be the id of a file or a job, and so a part of a path."""


class JobEvent(BaseModel, frozen=True):
    """Something that happened to a job.

    Attributes:
        id: `ftevent-...`.
        created: When, in seconds since 1970.
        level: How serious it is.
        message: For people; it names no path.
        data: Figures of a step: `step`, `total_steps`, and `train_loss` or `valid_loss` in nats per token, and more.
    """

    id: str
    created: int
    level: EventLevel = "info"
    message: str
    data: dict[str, Any] = {}


class Progress(BaseModel):
    """How far a job is.

    Attributes:
        step: Optimizer steps taken.
        total_steps: Optimizer steps that are planned.
        loss: Of the last step, in nats per token.
        seconds_left: Until it is over, as far as the steps of its worker tell.
        updated: When this was written, in seconds since 1970.
        trained_tokens: Tokens of the steps taken, as they were counted for the loss.
        best_loss: Lowest loss on the validation file so far, in nats per token; None without one.
    """

    step: int
    total_steps: int = 0
    loss: float | None = Field(None, validation_alias="train_loss")
    seconds_left: float | None = None
    updated: int = 0
    trained_tokens: int = 0
    best_loss: float | None = None


class JobFolder:
    """The files of a job.

    Args:
        root: Its folder.

    Attributes:
        inputs: What it reads, until it has ended.
        run: The run's folder, as `prefixtune train --output` makes it.
        checkpoints: The prefixes of its last evaluations, until it has ended.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.inputs, self.run = root, root / "inputs", root / "run"
        self.checkpoints, self._log = self.run / "checkpoints", root / "events.jsonl"

    def find_input(self, name: InputName) -> Path | None:
        """The file of that name, whatever its ending; None: the job has none."""
        return next(self.inputs.glob(f"{name}.*"), None)

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold the job while the block runs, as its worker does; yields whether nobody else holds it.

        Raises:
            OSError: The folder cannot be written, or the system has no locks.
        """
        self.root.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            # The lock's file is not deleted: another process may have it open.
            lock = acquire_lock(self.root / ".lock", 0.0)
            if lock is not None:
                stack.callback(lock.release)
            yield lock is not None

    # --- events -------------------------------------------------------------------------------------------------------

    def events(self, last_bytes: int = _LOG_BYTES) -> list[JobEvent]:
        """The events, the oldest first; of a very long log, those of its last bytes."""
        known: dict[str, JobEvent] = {}
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - last_bytes, 0))
            for line in file.read(last_bytes).split(b"\n"):
                with contextlib.suppress(ValidationError):
                    event = JobEvent.model_validate_json(line)
                    known.setdefault(event.id, event)
        return list(known.values())

    def progress(self) -> Progress | None:
        """How far the job is; None: it has taken no step."""
        told = [event for event in self.events(_TAIL_BYTES) if event.data]
        figures = {name: value for event in told for name, value in event.data.items()}
        stepped = [event.created for event in told if "train_loss" in event.data]
        return Progress(**figures, updated=stepped[-1]) if stepped else None

    def add_event(
        self, message: str, *, level: EventLevel = "info", data: dict[str, Any] | None = None, key: str = ""
    ) -> None:
        """Append an event.

        Args:
            message: What happened.
            level: How serious it is.
            data: Figures of a step.
            key: Names what happens at most once, such as a step: of two events with one key, the first is read; empty:
                it may happen any number of times.

        Raises:
            PrefixError: The log cannot be written.
        """
        digest = hashlib.sha256(f"{self.root.name}/{key or secrets.token_hex(12)}".encode()).hexdigest()
        event = JobEvent(
            id=f"ftevent-{digest[:24]}", created=int(time.time()), level=level, message=message, data=data or {}
        )
        append_line(self._log, event.model_dump_json())


class DataFolder:
    """Paths in a data folder; nothing is made by asking for one.

    Args:
        root: The folder.

    Attributes:
        files: The folders of uploaded files, and of results.
        jobs: The folders of all jobs.
        database: The file of the queue, where no other database is named.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.files, self.jobs = root, root / "files", root / "jobs"
        self.database = root / "jobs.sqlite"

    @property
    def database_url(self) -> str:
        """Of the queue, where no other is named."""
        return f"sqlite:///{quote(str(self.database))}"

    def make(self) -> None:
        """Make it, if it is missing.

        Raises:
            PrefixError: It cannot be made.
        """
        with reporting_write_errors(self.root):
            for folder in (self.root, self.files, self.jobs):
                # What is uploaded is nobody else's business.
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def job(self, job_id: str) -> JobFolder:
        """The folder of a job of the queue."""
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
        if not folder.root.exists():
            with atomic_files(folder.root) as made:
                new = JobFolder(made).inputs
                new.mkdir()
                for name, (source, ending) in inputs.items():
                    _put(source, new / f"{name}{ending}", copy=name == "init_prefix")
                fsync(new)
        return folder


def _put(source: Path, path: Path, *, copy: bool) -> None:
    """A second name of a file (of a symbolic link's file, not of the link) or, on another disk, a copy."""
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source.resolve(), path)
            return
    shutil.copyfile(source, path)
