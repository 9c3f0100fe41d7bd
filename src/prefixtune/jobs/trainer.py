"""The steps of a job's workflow: check it, train it, publish what it has trained.

The worker may be killed at any moment: whoever claims the job next goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import Job, JobFailedError, JobPausedError, JobResult
from prefixtune.jobs.opening import check_job, open_job
from prefixtune.jobs.publish import publish
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, Standing
from prefixtune.jobs.reporting import Reporter
from prefixtune.prefix.folder import FolderBusyError
from prefixtune.training.run import Run
from prefixtune.training.run_folder import Event
from prefixtune.training.together import positions_at_once
from prefixtune.utils.files import write_text

Step = Callable[[str, Callable[[], Any]], Any]
"""Does a step of a workflow, of this name, or returns what it left when it was done before."""

MAX_ATTEMPTS = 5
"""How often a job is begun without getting any further: one that kills its worker each time must end."""
_ATTEMPTS = "attempts.json"
_WAIT_SECONDS = 0.1
_ASK_SECONDS, _AWAY_SECONDS = 0.5, 3.0
"""Between two questions to the database, and after one that it did not answer."""
_LONGEST = 1000
_log = logging.getLogger("prefixtune.jobs")


class LeftError(BaseException):
    """A job is left: it was stopped, its worker ends, or another claim has it.

    No `Exception`, which DBOS would store as the job's outcome.
    """


class Trainer:
    """Trains the jobs of a worker, one at a time.

    Args:
        data: Where their folders are.
        jobs: Says where they stand.
        backbone: What they are trained on.
        prefixes: The folder that servers serve from.
        worker: The worker's name.
        stop: Ends the work after the running step. It is set here where the worker cannot go on.
        max_bytes: Largest prefix that servers take.

    Attributes:
        idle_since: When the last job was left, by the monotonic clock.
        error: Why the worker cannot go on.
    """

    def __init__(
        self,
        data: DataFolder,
        jobs: JobQueue,
        backbone: Backbone,
        prefixes: Path,
        *,
        worker: str,
        stop: threading.Event,
        max_bytes: int = 2**30,
    ) -> None:
        self.data, self.jobs, self.backbone, self.prefixes = data, jobs, backbone, prefixes
        self.worker, self.stop, self.max_bytes = worker, stop, max_bytes
        self.files, self.claims = FileStore(data), dict[str, object]()
        self.idle_since, self.is_away = time.monotonic(), False
        self.error: PrefixError | None = None
        self._turn = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a job is being trained."""
        return self._turn.locked()

    def run(self, job: Job, step: Step) -> dict[str, Any]:
        """Bring a job to its end, in any thread; returns its result as JSON.

        Raises:
            JobFailedError: It failed.
            LeftError: It was left.
        """
        claim = _Claim(job, self)
        # An earlier claim of the same job notices that it holds no more.
        self.claims[job.id] = claim
        with self._turn:
            try:
                step("check", lambda: claim.guard(claim.check))
                step("train", lambda: claim.guard(claim.train))
                result: dict[str, Any] = step("publish", lambda: claim.guard(claim.publish))
            except LeftError:
                _note("job_left", job=job.id, status=claim.status)
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
        _note("job_succeeded", job=job.id, model=job.name, steps=result["steps"])
        return result


class _Claim:
    """A claim of a job: holds until the job is stopped, or claimed again."""

    def __init__(self, job: Job, trainer: Trainer) -> None:
        self.job, self.trainer, self.folder = job, trainer, trainer.data.job(job.id)
        self.events = JobEvents(self.folder)
        self.status, self._ask_at = "", 0.0

    # --- the steps ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """See whether the job can be trained here."""
        check_job(self.job, self.folder, self.trainer.backbone)

    def train(self) -> None:
        """Train the job's run to its end, from where an earlier worker left it."""
        _count_attempt(self.folder)
        try:
            with open_job(self.job, self.folder, self.trainer.backbone, self._prepare) as run:
                self._take_steps(run)
        except LeftError:
            # Its worker left it in good order.
            _forget_attempts(self.folder)
            raise

    def _prepare(self, what: str, done: int, total: int | None) -> None:
        self.ask()
        if total:
            self.events.add(f"Preparing {what}: {done}/{total}", key=f"preparing/{what}/{10 * done // total}")

    def _take_steps(self, run: Run) -> None:
        """All steps that are left; or, if the job is stopped, this one: then its state is saved."""
        loop, leave = run.loop, threading.Event()
        loop.most_positions = positions_at_once(self.trainer.backbone)
        reporter, begun_at = Reporter(self.job, self.folder, run, self.events), loop.state.step
        _note("job_opened", job=self.job.id, step=begun_at, steps=loop.state.total_steps)

        def on_event(event: Event) -> None:
            reporter.report(event)
            if event["event"] == "save" and event["step"] > begun_at:
                _forget_attempts(self.folder)
            try:
                self.ask()
            except LeftError:
                leave.set()

        try:
            run.train(leave, on_event)
        except KeyboardInterrupt:
            reporter.leave()
            if self.status in ("paused", "cancelled"):
                message = f"Training is {self.status} at step {loop.state.step}/{loop.state.total_steps}."
                self.tell(message, key="cancelled" if self.status == "cancelled" else "")
            raise LeftError from None

    def publish(self) -> dict[str, Any]:
        """Publish what was trained; returns the job's result."""
        trainer = self.trainer
        self.ask(must_know=True)
        result: JobResult = publish(
            self.job, self.folder.run, trainer.backbone, trainer.prefixes, trainer.files, max_bytes=trainer.max_bytes
        )
        self.tell(f"The new model is served as {self.job.name!r}.", key="published")
        return result.model_dump(mode="json")

    # --- whether it goes on -------------------------------------------------------------------------------------------

    def guard(self, work: Callable[[], Any]) -> Any:
        """Do a step, and tell the job's owner how an error ends it: what the disk refuses pauses the job.

        Until it is done nobody else has the job's folder: what it publishes is removed only after it.

        Raises:
            JobFailedError: It failed.
            LeftError: It was left, or paused.
        """
        try:
            self.ask()
            self._check_folders()
            with contextlib.ExitStack() as stack:
                while not stack.enter_context(self.folder.hold()):
                    # A worker that has lost the job has not left it yet.
                    self.ask()
                    time.sleep(_WAIT_SECONDS)
                return work()
        except Exception as error:
            reason = _pause_reason(error)
            if not isinstance(error, PrefixError | JobFailedError | JobPausedError | OSError):
                _log.error("job_error", extra={"fields": {"job": self.job.id}}, exc_info=error)
                if work == self.publish:
                    # No fault of the job, and what one that fails has trained is removed.
                    reason = "the new model could not be stored, for a reason that the service's log has"
            if reason:
                _note("job_paused", logging.WARNING, job=self.job.id, reason=str(error))
                message = f"The job is paused: {reason}. Resume it when that has changed."
                self.tell(message, level="warn")
                _forget_attempts(self.folder)
                self._pause()
                raise LeftError from None
            failed = _failure(error, self.folder)
            _note("job_failed", logging.WARNING, job=self.job.id, code=failed.error.code, reason=str(error))
            self.tell(f"The job has failed: {failed.error.message}", level="error", key="failed")
            raise failed from None

    def _check_folders(self) -> None:
        if not self.trainer.data.jobs.is_dir():
            # No job's fault: each one that is claimed here would be paused.
            self.trainer.error = PrefixError(
                f"there is no folder of jobs {str(self.trainer.data.jobs)!r}, though jobs wait.",
                hint="check that its disk is mounted, and --data-folder.",
            )
            self.trainer.stop.set()
            raise LeftError
        # A job whose files are gone is paused.
        self.folder.inputs.stat()

    def ask(self, *, must_know: bool = False) -> None:
        """See whether the job is still this claim's to train: from time to time or, if it must be known, at once.

        Raises:
            LeftError: It is not, or the worker is to end.
        """
        trainer = self.trainer
        while not trainer.stop.is_set() and trainer.claims.get(self.job.id) is self:
            if time.monotonic() >= self._ask_at or must_know:
                try:
                    standing = trainer.jobs.standings([self.job.id]).get(self.job.id)
                except QueueUnavailableError as error:
                    self._note_away(error.message)
                    self._ask_at = time.monotonic() + _AWAY_SECONDS
                    if must_know:
                        trainer.stop.wait(_WAIT_SECONDS)
                        continue
                    return
                self._note_away("")
                self._ask_at = time.monotonic() + _ASK_SECONDS
                if standing != Standing("running", trainer.worker):
                    self.status = standing.status if standing else "deleted"
                    break
            return
        raise LeftError

    def _pause(self) -> None:
        """Pause the job as its owner would, once the database answers; not if it was stopped meanwhile."""
        with contextlib.suppress(LeftError, RequestError):
            while True:
                self.ask(must_know=True)
                try:
                    self.trainer.jobs.pause(self.job.id)
                except QueueUnavailableError:
                    # As where the database is on the full disk, and can be read only.
                    self.trainer.stop.wait(_AWAY_SECONDS)

    def _note_away(self, reason: str) -> None:
        """Log when the database goes away, and when it is back."""
        if bool(reason) != self.trainer.is_away:
            self.trainer.is_away = bool(reason)
            _note("database_away" if reason else "database_back", reason=reason)

    def tell(self, message: str, **options: Any) -> None:
        """Tell the job's owner something, if the disk lets one."""
        with contextlib.suppress(PrefixError):
            self.events.add(message, **options)


def _note(event: str, level: int = logging.INFO, **fields: Any) -> None:
    _log.log(level, event, extra={"fields": fields})


# --- attempts ---------------------------------------------------------------------------------------------------------


def _count_attempt(folder: JobFolder) -> None:
    """Note that a worker begins, before it does anything that may kill it.

    Raises:
        JobFailedError: Too many have begun since the job last got any further.
        PrefixError: It cannot be noted.
    """
    count = 0
    with contextlib.suppress(OSError, ValueError):
        count = int(json.loads((folder.root / _ATTEMPTS).read_bytes()))
    if count >= MAX_ATTEMPTS:
        message = f"{count} workers in a row ended unexpectedly while they trained this job, as for lack of memory."
        raise JobFailedError("worker_died", message)
    write_text(folder.root / _ATTEMPTS, json.dumps(count + 1))


def _forget_attempts(folder: JobFolder) -> None:
    """Count again from 0: the job got further, or its worker left it in good order."""
    with contextlib.suppress(OSError):
        (folder.root / _ATTEMPTS).unlink(missing_ok=True)


# --- why a job ends or waits ------------------------------------------------------------------------------------------

_CODES: tuple[tuple[type[PrefixError], str, str | None], ...] = (
    (DataError, "invalid_training_file", "training_file"),
    (ConfigError, "invalid_hyperparameters", None),
    (BackboneError, "unsupported_model", "model"),
    (CheckpointError, "invalid_state", None),
)


def _pause_reason(error: BaseException) -> str:
    """Why a job is paused by an error, as a part of a sentence: what the disk refuses may pass; empty: it fails."""
    if isinstance(error, JobPausedError):
        return str(error)
    refused = [one for one in causes(error) if isinstance(one, FolderBusyError | OSError)]
    if not refused or isinstance(error, JobFailedError | DataError | ConfigError | BackboneError):
        return ""
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in refused):
        return "the disk of the training service is full"
    return "a file or folder of the training service cannot be used now"


def _failure(error: BaseException, folder: JobFolder) -> JobFailedError:
    """What a job's owner is told of the error that ended it: without any path of the machine."""
    if isinstance(error, JobFailedError):
        return error
    if is_out_of_memory(error):
        message = "a training step needs more memory than there is; choose a smaller batch_size or shorter examples."
        return JobFailedError("out_of_memory", message, "hyperparameters.batch_size")
    if isinstance(error, TrainingError):
        # The rest is about the folder of the run.
        message = f"{error.message.partition(';')[0].removesuffix('.')}; try a lower learning_rate_multiplier."
        return JobFailedError("training_failed", message, "hyperparameters.learning_rate_multiplier")
    for kind, code, param in _CODES:
        if isinstance(error, kind):
            message = f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}".rstrip()
            for root in (folder.inputs, folder.root, folder.root.parent):
                message = message.replace(f"{root}/", "")
            return JobFailedError(code, message[:_LONGEST], param)
    message = "the training failed for a reason that was not foreseen; the service's log has it."
    return JobFailedError("internal_error", message)
