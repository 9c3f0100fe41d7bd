"""The steps of a job's workflow: train it, publish what it has trained.

The worker may be killed at any moment: whoever claims the job next goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbos import PortableWorkflowError

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    PrefixError,
    RequestError,
    TrainingError,
    causes,
    is_out_of_memory,
)
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobError, JobPausedError
from prefixtune.jobs.publish import publish
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.jobs.run import Reporter, open_job
from prefixtune.prefix.folder import FolderBusyError
from prefixtune.training.run import Run
from prefixtune.training.run_folder import Event
from prefixtune.training.together import positions_at_once

Step = Callable[[str, Callable[[], Any]], Any]
"""Does a step of a workflow, of this name, or returns what it left when it was done before."""

MAX_ATTEMPTS = 5
"""How often a job is begun without getting any further: one that kills its worker each time must end."""
_ASK_SECONDS, _AWAY_SECONDS = 0.5, 3.0
"""Between two questions to the database, and after one that it did not answer."""
_log = logging.getLogger("prefixtune.jobs")


class LeftError(BaseException):
    """A job is left: it was stopped, its worker ends, or another claim has it.

    No `Exception`, which DBOS would store as the job's outcome.
    """


@dataclass
class Trainer:
    """Trains the jobs of a worker, one at a time.

    Attributes:
        data: Where their folders are.
        jobs: Says where they stand.
        backbone: What they are trained on.
        prefixes: The folder that servers serve from.
        worker: The worker's name.
        stop: Ends the work after the running step.
        max_bytes: Largest prefix that servers take.
        idle_since: When the last job was left, by the monotonic clock.
        claims: Who trains a job here, by its id.
    """

    data: DataFolder
    jobs: JobQueue
    backbone: Backbone
    prefixes: Path
    worker: str
    stop: threading.Event
    max_bytes: int = 2**30
    idle_since: float = field(default_factory=time.monotonic)
    claims: dict[str, _Claim] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_busy(self) -> bool:
        """Whether a job is being trained."""
        return self._turn.locked()

    def run(self, job: Job, step: Step) -> dict[str, Any]:
        """Bring a job to its end, in any thread; returns its result as JSON.

        Raises:
            PortableWorkflowError: It failed.
            LeftError: It was left.
        """
        # An earlier claim of the same job notices that it holds no more.
        claim = self.claims[job.id] = _Claim(job, self)
        with self._turn:
            try:
                step("train", lambda: claim.guard(claim.train))
                result: dict[str, Any] = step("publish", lambda: claim.guard(claim.publish))
            except LeftError:
                # Its worker leaves it in good order.
                with contextlib.suppress(OSError):
                    claim.attempts.unlink(missing_ok=True)
                note("job_left", job=job.id, status=claim.status)
                if claim.status == "cancelled":
                    # Somebody may have resumed it in the same moment.
                    with contextlib.suppress(QueueUnavailableError, RequestError):
                        self.jobs.cancel(job.id)
                raise
            finally:
                self.idle_since = time.monotonic()
                if self.claims.get(job.id) is claim:
                    del self.claims[job.id]
        claim.tell("The job has succeeded.", key="succeeded")
        note("job_succeeded", job=job.id, model=job.name, steps=result["steps"])
        return result


class _Claim:
    """A claim of a job: holds until the job is stopped, or claimed again."""

    def __init__(self, job: Job, trainer: Trainer) -> None:
        self.job, self.trainer, self.folder = job, trainer, trainer.data.job(job.id)
        self.events, self.attempts = JobEvents(self.folder), self.folder.root / "attempts"
        self.status, self._ask_at = "", 0.0

    # --- the steps ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train the job's run to its end, from where an earlier worker left it."""
        # A byte for each worker that begins, before it does anything that may kill it.
        with self.attempts.open("ab") as file:
            if file.tell() >= MAX_ATTEMPTS:
                raise TrainingError(f"{MAX_ATTEMPTS} workers in a row ended while they trained this job.")
            file.write(b".")
        with open_job(self.job, self.folder, self.trainer.backbone, self._prepare) as run:
            self._take_steps(run)

    def _prepare(self, what: str, done: int, total: int | None) -> None:
        self.ask()
        if total:
            self.events.add(f"Preparing {what}: {done}/{total}", key=f"preparing/{what}/{10 * done // total}")

    def _take_steps(self, run: Run) -> None:
        """All steps that are left; or, if the job is stopped, this one: then its state is saved."""
        loop, leave = run.loop, threading.Event()
        loop.most_positions = positions_at_once(self.trainer.backbone)
        report, begun_at = Reporter(self.job, self.folder, run, self.events).report, loop.state.step
        note("job_opened", job=self.job.id, step=begun_at, steps=loop.state.total_steps)

        def on_event(event: Event) -> None:
            report(event)
            if event["event"] == "save" and event["step"] > begun_at:
                self.attempts.unlink(missing_ok=True)
            try:
                self.ask()
            except LeftError:
                leave.set()

        try:
            run.train(leave, on_event)
        except KeyboardInterrupt:
            if self.status in ("paused", "cancelled"):
                self.tell(f"Training is {self.status} at step {loop.state.step}/{loop.state.total_steps}.")
            raise LeftError from None

    def publish(self) -> dict[str, Any]:
        """Publish what was trained; returns the job's result."""
        trainer, files = self.trainer, FileStore(self.trainer.data)
        self.ask(now=True)
        result = publish(self.job, self.folder, trainer.backbone, trainer.prefixes, files, max_bytes=trainer.max_bytes)
        self.tell(f"The new model is served as {self.job.name!r}.", key="published")
        stored: dict[str, Any] = result.model_dump(mode="json")
        return stored

    # --- whether it goes on -------------------------------------------------------------------------------------------

    def guard(self, work: Callable[[], Any]) -> Any:
        """Do a step, and tell the job's owner how an error ends it: what the disk refuses pauses the job.

        Until it is done nobody else has the job's folder: what it publishes is removed only after it.

        Raises:
            PortableWorkflowError: It failed.
            LeftError: It was left, or paused.
        """
        try:
            self.ask()
            with contextlib.ExitStack() as stack:
                while not stack.enter_context(self.folder.hold()):
                    # A worker that has lost the job has not left it yet.
                    self.ask()
                    time.sleep(0.1)
                return work()
        except Exception as error:
            if reason := _pause_reason(error):
                note("job_paused", logging.WARNING, job=self.job.id, reason=str(error))
                self.tell(f"The job is paused: {reason}. Resume it when that has changed.", level="warn")
                self._pause()
                raise LeftError from None
            failed = _failure(error)
            unforeseen = error if failed.code == "internal_error" else None
            note("job_failed", logging.WARNING, unforeseen, job=self.job.id, reason=str(error))
            self.tell(f"The job has failed: {failed.message}", level="error", key="failed")
            # What DBOS stores as it is.
            raise PortableWorkflowError(failed.message, "JobFailedError", failed.code, failed.model_dump()) from None

    def ask(self, *, now: bool = False) -> None:
        """See whether the job is still this claim's to train: from time to time or, if it must be known, at once.

        While the database does not answer, nothing goes on.

        Raises:
            LeftError: It is not, or the worker is to end.
        """
        trainer = self.trainer
        while not trainer.stop.is_set() and trainer.claims.get(self.job.id) is self:
            if time.monotonic() < self._ask_at and not now:
                return
            try:
                state = trainer.jobs.states([self.job.id]).get(self.job.id)
            except QueueUnavailableError as error:
                self._wait(error)
                continue
            self._ask_at = time.monotonic() + _ASK_SECONDS
            self.status = state.status if state else "deleted"
            if state and (state.status, state.worker) == ("running", trainer.worker):
                return
            break
        raise LeftError

    def _pause(self) -> None:
        """Pause the job as its owner would, once the database answers; not if it was stopped meanwhile."""
        while True:
            self.ask(now=True)
            try:
                self.trainer.jobs.pause(self.job.id)
                return
            except QueueUnavailableError as error:
                # As where the database is on the full disk, and can be read only.
                self._wait(error)

    def _wait(self, error: QueueUnavailableError) -> None:
        note("database_away", logging.WARNING, reason=error.message)
        self.trainer.stop.wait(_AWAY_SECONDS)

    def tell(self, message: str, **options: Any) -> None:
        """Tell the job's owner something, if the disk lets one."""
        with contextlib.suppress(PrefixError):
            self.events.add(message, **options)


def note(event: str, level: int = logging.INFO, error: Exception | None = None, **fields: Any) -> None:
    """Write a line of the worker's log; with the traceback of an error that was not foreseen."""
    _log.log(level, event, exc_info=error, extra={"fields": fields})


# --- why a job ends or waits ------------------------------------------------------------------------------------------

_CODES: tuple[tuple[type[PrefixError], str, str | None], ...] = (
    (DataError, "invalid_training_file", "training_file"),
    (ConfigError, "invalid_hyperparameters", None),
    (BackboneError, "unsupported_model", "model"),
    (CheckpointError, "invalid_state", None),
    (TrainingError, "training_failed", "hyperparameters.learning_rate_multiplier"),
)
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^/'\"]+/)*")
"""Before the name of a file."""


def _pause_reason(error: Exception) -> str:
    """Why a job is paused by an error, as a part of a sentence: what the disk refuses may pass; empty: it fails."""
    if isinstance(error, JobPausedError):
        return str(error)
    refused = [one for one in causes(error) if isinstance(one, FolderBusyError | OSError)]
    if not refused or isinstance(error, DataError | ConfigError | BackboneError):
        return ""
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in refused):
        return "the disk of the training service is full"
    return "a file or folder of the training service cannot be used now"


def _failure(error: Exception) -> JobError:
    """What a job's owner is told of the error that ended it: without any path of the machine."""
    if is_out_of_memory(error):
        message = "a training step needs more memory than there is; choose a smaller batch_size or shorter examples."
        return JobError(code="out_of_memory", message=message, param="hyperparameters.batch_size")
    for kind, code, param in _CODES:
        if isinstance(error, kind):
            # A hint may name an option of a command line, which is not the reader's.
            message = _FOLDERS.sub("", error.message if "--" in error.hint else str(error))
            return JobError(code=code, message=message[:1000], param=param)
    message = "the training failed for a reason that was not foreseen; the service's log has it."
    return JobError(code="internal_error", message=message)
