"""Trains the jobs of a worker, one after the other, in one thread.

Executor threads submit what they have claimed and wait. The worker may be killed at any moment: whoever claims a job
next goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from prefixtune.attention.injection import interrupting
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import PrefixError, is_out_of_memory
from prefixtune.jobs.active import ActiveJob, hold_folder
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.executor import ClaimLostError, JobFailedError, JobPausedError
from prefixtune.jobs.failures import describe_failure, is_foreseen, pause_reason
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import Job, JobError, JobResult, JobStatus
from prefixtune.jobs.opening import open_job
from prefixtune.jobs.queue import QueueUnavailableError, Standing
from prefixtune.training.group import RunGroup
from prefixtune.utils.files import write_text

__all__ = ["Trainer"]


MAX_ATTEMPTS = 5
"""How often a job is begun without getting any further: one that kills its worker each time must end."""
_ATTEMPTS = "attempts.json"
_WAIT_SECONDS = 0.1
_ASK_SECONDS, _AWAY_SECONDS = 0.5, 3.0
"""Between two questions to the database, and after one that it did not answer."""
_log = logging.getLogger("prefixtune.jobs")


class _LeftError(Exception):
    """A job is left: its worker ends, or its claim holds no more.

    Args:
        status: Where the job stands then; None: nowhere, or its worker ends.
    """

    def __init__(self, status: JobStatus | None = None) -> None:
        super().__init__(status)
        self.status = status


@dataclasses.dataclass(eq=False)
class _Claim:
    """A claim of a job, which waits for the job's end."""

    job: Job
    token: str
    future: Future[JobResult] = dataclasses.field(default_factory=Future)
    ask_at: float = 0.0


class Trainer:
    """Trains the jobs that are submitted to it.

    Args:
        data: Where their folders are.
        load: Loads the backbone, when the first job comes.
        publish: Publishes what a job has trained, from its folder; it may be called again for the same job.
        standing: Says where a job stands; None: it does not exist.
    """

    def __init__(
        self,
        data: DataFolder,
        *,
        load: Callable[[], Backbone],
        publish: Callable[[Job, Path, Backbone], JobResult],
        standing: Callable[[str], Standing | None],
    ) -> None:
        self._data, self._load, self._publish, self._standing = data, load, publish, standing
        self._submitted = queue.SimpleQueue[_Claim]()
        self._backbone: Backbone | None = None
        self._is_away = False

    def submit(self, job: Job, token: str) -> JobResult:
        """Train a job to its end; blocks, and may be called in any thread.

        Args:
            job: What is to be trained.
            token: Of the claim.

        Raises:
            JobFailedError: It failed.
            JobPausedError: It cannot go on now; what it has trained is kept.
            ClaimLostError: It was stopped, or another claim has it: nobody asks for this one's result.
        """
        claim = _Claim(job, token)
        self._submitted.put(claim)
        # As long as training takes; a worker that ends lets the process end without an answer.
        return claim.future.result()

    def work(self, stop: threading.Event, idle_seconds: float = 0.0) -> None:
        """Train until `stop` is set, or until there was nothing to do for some time; the state is saved then.

        Args:
            stop: Ends the work after the running step.
            idle_seconds: Time without a job after which it ends; 0: it never does.

        Raises:
            PrefixError: The backbone cannot be loaded, or the data folder is not that of the jobs.
        """
        busy = time.monotonic()
        while not stop.is_set():
            try:
                claim = self._submitted.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                if idle_seconds and time.monotonic() - busy >= idle_seconds:
                    return
                continue
            if not self._data.jobs.is_dir():
                # No job's fault: each one that is claimed here would be paused.
                raise PrefixError(
                    f"there is no folder of jobs {str(self._data.jobs)!r}, though jobs wait.",
                    hint="check that its disk is mounted, and --data-folder.",
                )
            self._backbone = self._backbone or self._load()
            self._serve(claim, self._backbone, stop)
            busy = time.monotonic()

    def _serve(self, claim: _Claim, backbone: Backbone, stop: threading.Event) -> None:
        """Bring a claim to its end."""
        job, folder = claim.job, self._data.job(claim.job.id)
        events = JobEvents(folder)
        try:
            result = self._train(claim, folder, events, backbone, stop)
        except _LeftError as left:
            if not stop.is_set():
                _log.info("job_stopped", extra={"fields": {"job": job.id, "status": left.status or "deleted"}})
                claim.future.set_exception(ClaimLostError())
        except Exception as error:
            claim.future.set_exception(_end_of(job, folder, events, error))
        else:
            claim.future.set_result(result)
            _log.info("job_succeeded", extra={"fields": {"job": job.id, "model": job.name, "steps": result.steps}})

    def _train(
        self, claim: _Claim, folder: JobFolder, events: JobEvents, backbone: Backbone, stop: threading.Event
    ) -> JobResult:
        """Train a job's run to its end, and publish it.

        Raises:
            _LeftError: It was left before.
            Exception: It cannot go on.
        """

        def check() -> None:
            self._check(claim, stop)

        def preparing(what: str, done: int, total: int | None) -> None:
            check()
            if total:
                events.add(f"Preparing {what}: {done}/{total}", key=f"preparing/{what}/{10 * done // total}")

        # It may have been cancelled, and its folder cleared, while another one trained.
        check()
        # A job whose files are gone is paused.
        folder.inputs.stat()
        with contextlib.ExitStack() as holding:
            while not holding.enter_context(hold_folder(folder)):
                # A worker that has lost the job has not left it yet.
                check()
                time.sleep(_WAIT_SECONDS)
            _count_attempt(folder)
            try:
                with contextlib.ExitStack() as opening:
                    with interrupting(check):
                        run = opening.enter_context(open_job(claim.job, folder, backbone, preparing))
                    active = ActiveJob(claim.job, folder, run, events, on_further=lambda: _forget_attempts(folder))
                    fields = {"job": claim.job.id, "step": active.step, "steps": active.total_steps}
                    _log.info("job_opened", extra={"fields": fields})
                    try:
                        _take_steps(active, RunGroup(backbone, ()), check)
                    except _LeftError as left:
                        _leave(active, left.status)
                        raise
                self._wait_until_wanted(claim, stop)
            except _LeftError:
                # Its worker left it in good order.
                with contextlib.suppress(OSError):
                    _forget_attempts(folder)
                raise
            try:
                result = self._publish(claim.job, folder.run, backbone)
            except Exception as error:
                if is_foreseen(error) and not is_out_of_memory(error):
                    raise
                # What a job that fails has trained is removed, and this is no fault of the job.
                _log.error("not_published", extra={"fields": {"job": claim.job.id}}, exc_info=error)
                reason = "the new model could not be stored, for a reason that the service's log has"
                raise JobPausedError(reason) from error
            for message, key in (
                (f"The new model is served as {claim.job.name!r}.", "published"),
                ("The job has succeeded.", "succeeded"),
            ):
                # It is published, whether its owner can be told or not.
                with contextlib.suppress(PrefixError):
                    events.add(message, key=key)
            return result

    def _check(self, claim: _Claim, stop: threading.Event) -> bool:
        """See from time to time whether a job is still this claim's to train; returns whether the database says so.

        Raises:
            _LeftError: It is not, or the worker is to end.
        """
        if stop.is_set():
            raise _LeftError
        if time.monotonic() < claim.ask_at:
            return False
        try:
            standing = self._standing(claim.job.id)
        except QueueUnavailableError as error:
            self._note_away(error.message)
            claim.ask_at = time.monotonic() + _AWAY_SECONDS
            return False
        self._note_away("")
        claim.ask_at = time.monotonic() + _ASK_SECONDS
        if standing != Standing("running", claim.token):
            raise _LeftError(None if standing is None else standing.status)
        return True

    def _wait_until_wanted(self, claim: _Claim, stop: threading.Event) -> None:
        """Ask whether the result is still wanted, until the database answers."""
        claim.ask_at = 0.0
        while not self._check(claim, stop):
            stop.wait(_WAIT_SECONDS)

    def _note_away(self, reason: str) -> None:
        """Log when the database goes away, and when it is back."""
        if bool(reason) != self._is_away:
            self._is_away = bool(reason)
            if reason:
                _log.warning("database_away", extra={"fields": {"reason": reason}})
            else:
                _log.info("database_back", extra={"fields": {}})


def _take_steps(active: ActiveJob, group: RunGroup, check: Callable[[], None]) -> None:
    """All steps of a run that are left."""
    group.add(active.run)
    never = threading.Event()
    while active.run in group.runs:
        check()
        for _, event in group.step(never):
            active.record(event)
        if active.run in group.runs:
            active.save_if_due()


def _leave(active: ActiveJob, status: JobStatus | None) -> None:
    """Save a job's state, and tell its owner why it is left."""
    try:
        if status in ("paused", "cancelled"):
            message = f"Training is {status} at step {active.step}/{active.total_steps}."
            active.events.add(message, key="cancelled" if status == "cancelled" else "")
        active.leave()
    except Exception as error:
        # The last good state is kept.
        _log.warning("state_not_saved", extra={"fields": {"job": active.job.id, "reason": str(error)}})


def _end_of(job: Job, folder: JobFolder, events: JobEvents, error: Exception) -> JobFailedError | JobPausedError:
    """How an error ends a job, of which its owner is told: what the disk refuses pauses it."""
    fields, foreseen = {"job": job.id, "reason": str(error)}, is_foreseen(error)
    end: JobFailedError | JobPausedError
    if reason := pause_reason(error):
        event, end, level = "job_paused", JobPausedError(reason), logging.WARNING
        message, key = f"The job is paused: {reason}. Resume it when that has changed.", ""
        with contextlib.suppress(OSError):
            _forget_attempts(folder)
    else:
        event, end = "job_failed", JobFailedError(describe_failure(error, folder))
        level = logging.WARNING if foreseen else logging.ERROR
        fields["code"] = end.error.code
        message, key = f"The job has failed: {end.error.message}", "failed"
    with contextlib.suppress(PrefixError):
        events.add(message, level="warn" if isinstance(end, JobPausedError) else "error", key=key)
    _log.log(level, event, extra={"fields": fields}, exc_info=None if foreseen else error)
    return end


# --- attempts ---------------------------------------------------------------------------------------------------------


def _count_attempt(folder: JobFolder) -> None:
    """Note that a worker begins, before it does anything that may kill it.

    Raises:
        JobFailedError: Too many have begun since the job last got any further.
        PrefixError: It cannot be noted.
    """
    try:
        count = int(json.loads((folder.root / _ATTEMPTS).read_bytes())["attempts"])
    except (OSError, ValueError, TypeError, KeyError):
        count = 0
    if count >= MAX_ATTEMPTS:
        message = f"{count} workers in a row ended unexpectedly while they trained this job, as for lack of memory."
        raise JobFailedError(JobError(code="worker_died", message=message))
    write_text(folder.root / _ATTEMPTS, json.dumps({"attempts": count + 1}))


def _forget_attempts(folder: JobFolder) -> None:
    """Count again from 0: the job got further, or its worker left it in good order."""
    (folder.root / _ATTEMPTS).unlink(missing_ok=True)
