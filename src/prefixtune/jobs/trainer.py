"""Trains jobs, all of them in one running group: they join and leave between its steps.

Executor threads submit what they have claimed and wait; one thread does all the work. It may be killed at any moment:
whoever claims a job next goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from prefixtune.attention.injection import interrupting
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import PrefixError
from prefixtune.jobs.active import ActiveJob, Claim, hold_folder
from prefixtune.jobs.attempts import SUSPICIOUS_ATTEMPTS, count_attempt, forget_attempts, num_attempts
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.executor import ClaimLostError, JobFailedError, JobPausedError
from prefixtune.jobs.failures import describe_failure, describe_obstacle, is_foreseen, is_temporary, may_be_mended
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import ENDED, Job, JobError, JobResult, JobStatus
from prefixtune.jobs.opening import open_job
from prefixtune.jobs.queue import Standing
from prefixtune.jobs.retention import clear_folder
from prefixtune.jobs.statuses import StatusReport, StatusWatch
from prefixtune.jobs.turns import Turns
from prefixtune.training.folder import Event
from prefixtune.training.group import RunGroup
from prefixtune.training.runs import Run

__all__ = ["Trainer"]


_WAIT_SECONDS = 0.1
_RETRY_SECONDS = 0.5
"""Between two tries to open a job that somebody else still holds."""
_PUBLISH_PAUSE, _PUBLISH_SECONDS = 5.0, 3600.0
"""Between two tries to publish a result, and how long it is tried."""
_log = logging.getLogger("prefixtune.jobs")


class _LeftError(Exception):
    """A job is left while it is prepared."""


class Trainer:
    """Trains the jobs that are submitted to it.

    Args:
        data: Where their folders are.
        load: Loads the backbone, when the first job comes.
        publish: Publishes what a job has trained, from its folder; it may be called again for the same job.
        unpublish: Takes it back.
        statuses: Says where jobs stand.
        capacity: Most jobs that train at once.
    """

    def __init__(
        self,
        data: DataFolder,
        *,
        load: Callable[[], Backbone],
        publish: Callable[[Job, Path, Backbone], JobResult],
        unpublish: Callable[[Job], object],
        statuses: StatusWatch,
        capacity: int,
    ) -> None:
        self._data, self._load, self._publish, self._unpublish = data, load, publish, unpublish
        self._statuses, self._capacity = statuses, capacity
        self._submitted = queue.SimpleQueue[Claim]()
        self._waiting: list[Claim] = []
        # Of those that wait, the one that is prepared, while the others train.
        self._preparing: Claim | None = None
        self._active: dict[Run, ActiveJob] = {}
        # Trained; published once the database says that they still run.
        self._trained: list[ActiveJob] = []
        # Published; taken back if the database says that they were cancelled just before.
        self._published: dict[str, tuple[float, Job]] = {}
        self._backbone: Backbone | None = None
        self._group: RunGroup | None = None
        self._seen = StatusReport()
        self._ask_now = False
        self._next_try = 0.0
        self._is_away = False
        # Why jobs were paused or failed, where their owners could not be told yet.
        self._missing_events: dict[str, Callable[[], None]] = {}
        self._write_at = 0.0

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
        claim = Claim(job, token)
        self._submitted.put(claim)
        # As long as training takes; a worker that ends lets the process end without an answer.
        return claim.future.result()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        busy = self._active or self._waiting or self._trained or self._published
        return not busy and self._submitted.empty()

    def work(self, stop: threading.Event, idle_seconds: float = 0.0) -> None:
        """Train until `stop` is set, or until there was nothing to do for some time; states are saved then.

        Args:
            stop: Ends the work after the running step.
            idle_seconds: Time without a job after which it ends; 0: it never does.

        Raises:
            PrefixError: The backbone cannot be loaded.
        """
        busy = time.monotonic()
        while not stop.is_set():
            if not self._take_turn(stop):
                if self.is_idle:
                    if idle_seconds and time.monotonic() - busy >= idle_seconds:
                        break
                    self._wait_for_jobs()
                    continue
                time.sleep(_WAIT_SECONDS)
            busy = time.monotonic()
        for active in self._all_open():
            self._leave(active)

    def _take_turn(self, stop: threading.Event) -> bool:
        """Do what is to be done, and one step; returns whether there was one."""
        self._take_submitted()
        self._apply_statuses()
        self._write_missing_events()
        self._open_waiting(stop)
        self._publish_trained()
        has_step = bool(self._active)
        if has_step:
            self._step()
        return has_step

    # --- coming -------------------------------------------------------------------------------------------------------

    def _wait_for_jobs(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._waiting.append(self._submitted.get(timeout=_WAIT_SECONDS))

    def _take_submitted(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.append(self._submitted.get_nowait())

    def _open_waiting(self, stop: threading.Event) -> None:
        """Open the run of a job that waits, if there is room for it."""
        if not self._waiting or time.monotonic() < self._next_try:
            return
        backbone, group = self._loaded()
        # Rows of such a backbone cannot be packed, so that its runs share no pass.
        capacity = self._capacity if backbone.layout.packable else 1
        for claim in list(self._waiting):
            if stop.is_set():
                return
            if claim not in self._waiting:
                # It was opened while one before it was prepared.
                continue
            same = next((one for one in self._all_open() if one.job.id == claim.job.id), None)
            if same is not None:
                # Paused and resumed, or taken over, before anybody here noticed.
                same.claims.append(claim)
            elif len(self._active) + (self._preparing is not None) >= capacity or not self._may_join(claim):
                continue
            elif not self._open(claim, backbone, group, stop):
                self._next_try = time.monotonic() + _RETRY_SECONDS
                continue
            else:
                self._waiting.remove(claim)
                # The others have a step before the next one is opened.
                return
            self._waiting.remove(claim)

    def _may_join(self, claim: Claim) -> bool:
        """Whether a job may train beside the others: one that may kill its worker waits until they have saved.

        Otherwise those that it takes with it would be suspected as well. A document waits for another that is prepared.
        """
        is_suspicious = num_attempts(self._data.job(claim.job.id)) >= SUSPICIOUS_ATTEMPTS
        if (prepared := self._preparing) is not None:
            may_kill = is_suspicious or num_attempts(self._data.job(prepared.job.id)) > SUSPICIOUS_ATTEMPTS
            if may_kill or claim.job.kind == "document" or claim.job.id == prepared.job.id:
                return False
        unsaved = [active for active in self._active.values() if not active.got_further]
        return not (unsaved and (is_suspicious or any(active.is_suspicious for active in unsaved)))

    def _all_open(self) -> list[ActiveJob]:
        return [*self._active.values(), *self._trained]

    def _loaded(self) -> tuple[Backbone, RunGroup]:
        if self._backbone is None or self._group is None:
            self._backbone = self._load()
            self._group = RunGroup(self._backbone, (Exception,))
        return self._backbone, self._group

    def _open(self, claim: Claim, backbone: Backbone, group: RunGroup, stop: threading.Event) -> bool:
        """Let a job join the group, or fail; False: somebody else still holds it, or it is to be left."""
        job = claim.job
        folder = self._data.job(job.id)
        events = JobEvents(folder)

        def check() -> None:
            if stop.is_set() or self._is_stale(claim, self._statuses.latest):
                raise _LeftError

        def preparing(what: str, done: int, total: int | None) -> None:
            check()
            if total:
                events.add(f"Preparing {what}: {done}/{total}", key=f"preparing/{what}/{10 * done // total}")

        with contextlib.ExitStack() as holding:
            try:
                if self._note_away():
                    return False
                if not folder.root.is_dir():
                    raise JobFailedError(JobError(code="files_gone", message="the files of this job are gone."))
                if not holding.enter_context(hold_folder(folder)):
                    return False
                count_attempt(folder)
                with contextlib.ExitStack() as closing:
                    with self._training_others(claim, Turns(check, lambda: self._take_turn(stop), backbone.device)):
                        run = closing.enter_context(open_job(job, folder, backbone, preparing))
                    active = ActiveJob(claim, folder, run, events, closing=closing.pop_all(), holding=holding.pop_all())
            except _LeftError:
                # Its claim holds no more, which is seen next, or this worker ends.
                forget_attempts(folder)
                return False
            except Exception as error:
                self._give_up([claim], folder, events, error, pause=is_temporary(error, folder))
                return True
        run = active.run
        self._missing_events.pop(job.id, None)
        self._active[run] = active
        group.add(run)
        _log.info("job_opened", extra={"fields": {"job": job.id, "step": active.step, "steps": active.total_steps}})
        return True

    def _note_away(self) -> bool:
        """Whether the whole data folder is away, such as a disk that is not mounted now; said once."""
        is_away = not self._data.jobs.is_dir()
        if is_away and not self._is_away:
            _log.warning("data_folder_away", extra={"fields": {"folder": str(self._data.root)}})
        self._is_away = is_away
        return is_away

    @contextlib.contextmanager
    def _training_others(self, claim: Claim, turns: Turns) -> Iterator[None]:
        """While the block prepares a job, the others have turns; not while one of these is prepared in its turn."""
        if self._preparing is not None:
            yield
            return
        self._preparing = claim
        try:
            with interrupting(turns):
                yield
        finally:
            self._preparing = None

    # --- training -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One step of all jobs."""
        _, group = self._loaded()
        ended: list[Run] = []
        failed: list[tuple[Run, Exception]] = []
        for run, event in group.step(threading.Event()):
            # All of the step must be used up: the other runs are in the middle of it.
            if self._recorded(run, event, failed) and event["event"] == "end":
                ended.append(run)
        for run, active in list(self._active.items()):
            if run in group.runs:
                with _collecting(run, failed):
                    active.save_if_due()
        failed += group.failed
        group.failed.clear()
        for run, error in failed:
            group.remove(run)
            if run in self._active:
                self._fail(self._active.pop(run), error)
        for run in ended:
            if run in self._active:
                self._end_run(self._active.pop(run))

    def _recorded(self, run: Run, event: Event, failed: list[tuple[Run, Exception]]) -> bool:
        with _collecting(run, failed):
            self._active[run].record(event)
            return True
        return False

    def _end_run(self, active: ActiveJob) -> None:
        """All steps are taken: ask whether the result is still wanted."""
        try:
            active.close_run()
        except Exception as error:
            _log.warning("close_failed", extra={"fields": {"job": active.job.id}}, exc_info=error)
        self._trained.append(active)
        self._ask_now = True

    # --- ending -------------------------------------------------------------------------------------------------------

    def _apply_statuses(self) -> None:
        """Leave jobs that are paused or cancelled; take back what was published just too late."""
        watched = {active.job.id for active in self._all_open()} | {claim.job.id for claim in self._waiting}
        self._statuses.watch(watched | self._published.keys(), at_once=self._ask_now)
        self._ask_now = False
        if self._statuses.latest is self._seen:
            return
        report = self._seen = self._statuses.latest
        for claim in [one for one in self._waiting if self._is_stale(one, report) and one is not self._preparing]:
            self._waiting.remove(claim)
            _end_lost([claim])
        for active in self._all_open():
            lost = [claim for claim in active.claims if self._is_stale(claim, report)]
            if len(lost) == len(active.claims):
                self._stop(active, report.status(active.job.id))
            elif lost:
                active.claims = [claim for claim in active.claims if claim not in lost]
                _end_lost(lost)
        for job_id, (since, job) in list(self._published.items()):
            if job_id in report.job_ids and since <= report.asked:
                self._confirm_end(job, report.status(job_id))

    def _is_stale(self, claim: Claim, report: StatusReport) -> bool:
        """Whether a claim holds no more: the job does not run, or it was paused and resumed, and is another claim's."""
        known = claim.job.id in report.job_ids and claim.submitted <= report.asked
        return known and report.standings.get(claim.job.id) != Standing("running", claim.token)

    def _confirm_end(self, job: Job, status: JobStatus | None) -> None:
        """Forget a published job once its end is in the database."""
        if status == "running":
            return
        if status in ("cancelled", "failed"):
            try:
                self._unpublish(job)
            except PrefixError as error:
                _log.warning("unpublish_failed", extra={"fields": {"job": job.id, "reason": error.message}})
                return
        if status in ENDED:
            # Nobody goes on from it; a paused job that was just too late is published again.
            clear_folder(self._data.job(job.id), status)
        del self._published[job.id]

    def _stop(self, active: ActiveJob, status: JobStatus | None) -> None:
        """Leave a job that somebody has paused, cancelled or deleted."""
        if status == "paused":
            self._tell(active, f"Training is paused at step {active.step}/{active.total_steps}.")
        elif status == "cancelled":
            self._tell(active, f"Training is cancelled at step {active.step}/{active.total_steps}.", key="cancelled")
        self._leave(active)
        _end_lost(active.claims)
        fields = {"job": active.job.id, "status": status or "deleted", "step": active.step}
        _log.info("job_stopped", extra={"fields": fields})

    def _tell(self, active: ActiveJob, message: str, key: str = "") -> None:
        """Tell the owner what does not depend on being told."""
        with contextlib.suppress(PrefixError):
            active.events.add(message, key=key)

    def _leave(self, active: ActiveJob) -> None:
        """Save a job's state, if it can be, and let others have it."""
        if self._active.pop(active.run, None) and self._group is not None:
            self._group.remove(active.run)
            try:
                active.leave()
            except Exception as error:
                # The last good state is kept.
                _log.warning("state_not_saved", extra={"fields": {"job": active.job.id, "reason": str(error)}})
        self._trained = [trained for trained in self._trained if trained is not active]
        with contextlib.suppress(OSError):
            forget_attempts(active.folder)
        _close(active)

    def _publish_trained(self) -> None:
        """Publish what is trained and, by an answer that came later, still wanted."""
        report = self._seen
        backbone = self._backbone
        if self._trained and self._note_away():
            return
        for active in list(self._trained):
            job = active.job
            is_wanted = report.status(job.id) == "running" and report.asked >= active.trained_at
            if backbone is None or not is_wanted or time.monotonic() < active.publish_at:
                continue
            try:
                active.write_log()
                result = self._publish(job, active.folder.run, backbone)
            except Exception as error:
                is_late = time.monotonic() >= active.trained_at + _PUBLISH_SECONDS
                if is_temporary(error, active.folder) and not is_late:
                    self._postpone(active, error)
                else:
                    # What is trained is kept, unless it is broken: once what is wrong is mended, the job is resumed.
                    self._trained.remove(active)
                    self._fail(active, error, pause=may_be_mended(error))
                continue
            self._tell(active, f"The new model is served as {job.name!r}.", key="published")
            self._tell(active, "The job has succeeded.", key="succeeded")
            self._trained.remove(active)
            self._published[job.id] = time.monotonic(), job
            _close(active)
            for claim in active.claims:
                claim.future.set_result(result)
            _log.info("job_succeeded", extra={"fields": {"job": job.id, "model": job.name, "steps": result.steps}})

    def _write_missing_events(self) -> None:
        """Tell owners what could not be written before; not of jobs whose folders are gone by now."""
        if not self._missing_events or time.monotonic() < self._write_at:
            return
        self._write_at = time.monotonic() + _RETRY_SECONDS
        for job_id, tell in list(self._missing_events.items()):
            if not self._data.job(job_id).root.is_dir() or _was_written(tell):
                del self._missing_events[job_id]

    def _postpone(self, active: ActiveJob, error: Exception) -> None:
        """Publish a result later: what is trained is not to be lost."""
        active.publish_at = time.monotonic() + _PUBLISH_PAUSE
        self._tell(active, "The new model cannot be stored now, which is tried again.", key="postponed")
        _log.warning("publish_postponed", extra={"fields": {"job": active.job.id, "reason": str(error)}})

    def _fail(self, active: ActiveJob, error: Exception, *, pause: bool = False) -> None:
        """An open job has an error; what the disk refuses pauses it, and so does `pause`."""
        _close(active)
        pause = pause or is_temporary(error, active.folder)
        self._give_up(active.claims, active.folder, active.events, error, pause=pause)

    def _give_up(
        self, claims: list[Claim], folder: JobFolder, events: JobEvents, error: Exception, *, pause: bool
    ) -> None:
        """Let a job fail, or have it paused: it is resumed from its last state, as one that has failed never is."""
        fields, foreseen = {"job": claims[0].job.id, "reason": str(error)}, is_foreseen(error)
        end: JobFailedError | JobPausedError
        if pause:
            event, end, level = "job_paused", JobPausedError(), logging.WARNING
            message = f"The job is paused: {describe_obstacle(error)}. Resume it when that has changed."
            with contextlib.suppress(OSError):
                forget_attempts(folder)
            tell = partial(events.add, message, level="warn")
        else:
            event, end = "job_failed", JobFailedError(describe_failure(error, folder))
            fields["code"] = end.error.code
            level = logging.WARNING if foreseen else logging.ERROR
            tell = partial(events.add, f"The job has failed: {end.error.message}", level="error", key="failed")
        if folder.root.is_dir() and not _was_written(tell):
            self._missing_events[claims[0].job.id] = tell
        for claim in claims:
            claim.future.set_exception(end)
        _log.log(level, event, extra={"fields": fields}, exc_info=None if foreseen else error)


def _was_written(tell: Callable[[], None]) -> bool:
    """Whether an owner could be told."""
    try:
        tell()
    except PrefixError:
        return False
    return True


def _close(active: ActiveJob) -> None:
    try:
        active.release()
    except Exception as error:
        _log.warning("close_failed", extra={"fields": {"job": active.job.id}}, exc_info=error)


def _end_lost(claims: list[Claim]) -> None:
    """End claims that hold no more: the database heeds none of what they say."""
    for claim in claims:
        claim.future.set_exception(ClaimLostError())


@contextlib.contextmanager
def _collecting(run: Run, failed: list[tuple[Run, Exception]]) -> Iterator[None]:
    """Note an error of a run instead of raising it."""
    try:
        yield
    except Exception as error:
        failed.append((run, error))
