"""The steps of a job's workflow: train it, publish what it has trained; and what its owner is told of it.

The worker may be killed at any moment: whoever claims the job next goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbos import PortableWorkflowError

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.distill import open_memory
from prefixtune.errors import BackboneError, PrefixError, TrainingError
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import Job, failure_of, pause_reason
from prefixtune.jobs.publish import keep_checkpoint, publish
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.prepare import prepare
from prefixtune.training.run import Run
from prefixtune.training.run_folder import Event
from prefixtune.training.together import positions_at_once
from prefixtune.utils.console import Console, Progress

Step = Callable[[str, Callable[[], Any]], Any]
"""Does a step of a workflow, of this name, or returns what it left when it was done before."""

MAX_ATTEMPTS = 5
"""How often a job is begun without getting any further: one that kills its worker each time must end."""
_ASK_SECONDS, _AWAY_SECONDS = 0.5, 3.0
"""Between two questions to the database, and after one that it did not answer."""
_MOST_SAVES, _MOST_LOST = 50, 100
"""A run's state is saved so often, and at least after so many steps: a kill loses no more."""
_MOST_STEPS_TOLD = 2000
"""Of a longer run, every second step is an event, or every third ..."""
OnProgress = Callable[[str, int, int | None], None]
"""Called with what is being prepared, how much of it is done, and how much there is."""
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
    """

    data: DataFolder
    jobs: JobQueue
    backbone: Backbone
    prefixes: Path
    worker: str
    stop: threading.Event
    max_bytes: int = 2**30
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_busy(self) -> bool:
        """Whether a job is being trained."""
        return self._turn.locked()

    def run(self, job: Job, step: Step) -> None:
        """Bring a job to its end, in any thread.

        Raises:
            PortableWorkflowError: It failed.
            LeftError: It was left.
        """
        claim = _Claim(job, self)
        with self._turn:
            try:
                step("train", lambda: claim.guard(claim.train))
                step("publish", lambda: claim.guard(claim.publish))
            except LeftError:
                # Its worker leaves it in good order.
                with contextlib.suppress(OSError):
                    claim.attempts.unlink(missing_ok=True)
                note("job_left", job=job.id, status=claim.status)
                raise
        claim.tell("The job has succeeded.", key="succeeded")
        note("job_succeeded", job=job.id, model=job.name)


class _Claim:
    """A job that this worker has claimed, until it is stopped or another worker has it."""

    def __init__(self, job: Job, trainer: Trainer) -> None:
        self.job, self.trainer, self.folder = job, trainer, trainer.data.job(job.id)
        self.attempts, self.status, self._ask_at = self.folder.root / "attempts", "", 0.0

    # --- the steps ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train the job's run to its end, from where an earlier worker left it; or leave it with its state saved."""
        # A byte for each worker that begins, before it does anything that may kill it.
        with self.attempts.open("ab") as file:
            if file.tell() >= MAX_ATTEMPTS:
                raise TrainingError(f"{MAX_ATTEMPTS} workers in a row ended while they trained this job.")
            file.write(b".")
        with open_job(self.job, self.folder, self.trainer.backbone, self._prepare) as run:
            loop, leave = run.loop, threading.Event()
            loop.most_positions = positions_at_once(self.trainer.backbone)
            report, begun_at = Reporter(self.job, self.folder, run).report, loop.state.step
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

    def _prepare(self, what: str, done: int, total: int | None) -> None:
        self.ask()
        if total:
            self.folder.add_event(f"Preparing {what}: {done}/{total}", key=f"preparing/{what}/{10 * done // total}")

    def publish(self) -> None:
        """Publish what was trained."""
        at = self.trainer
        publish(self.job, self.folder, at.backbone, at.prefixes, FileStore(at.data), max_bytes=at.max_bytes)
        self.tell(f"The new model is served as {self.job.name!r}.", key="published")

    # --- whether it goes on -------------------------------------------------------------------------------------------

    def guard(self, work: Callable[[], None]) -> None:
        """Do a step, and tell the job's owner how an error ends it: what the disk refuses pauses the job.

        Until it is done nobody else has the job's folder: what it publishes is removed only after it.

        Raises:
            PortableWorkflowError: It failed.
            LeftError: It was left, or paused.
        """
        try:
            while True:
                self.ask(now=True)
                with self.folder.hold() as held:
                    if held:
                        return work()
                # A worker that has lost the job has not left it yet.
                time.sleep(_ASK_SECONDS)
        except Exception as error:
            if reason := pause_reason(error):
                note("job_paused", logging.WARNING, job=self.job.id, reason=str(error))
                self.tell(f"The job is paused: {reason} Resume it when that has changed.", level="warn")
                self.ask(now=True)
                self._reach(lambda: self.trainer.jobs.pause(self.job.id))
                raise LeftError from None
            failed = failure_of(error)
            unforeseen = error if failed.code == "internal_error" else None
            note("job_failed", logging.WARNING, unforeseen, job=self.job.id, reason=str(error))
            self.tell(f"The job has failed: {failed.message}", level="error", key="failed")
            # What DBOS stores as it is.
            raise PortableWorkflowError(failed.message, "JobFailedError", failed.code, failed.model_dump()) from None

    def ask(self, *, now: bool = False) -> None:
        """See whether the job is still this worker's to train: from time to time or, if it must be known, at once.

        Raises:
            LeftError: It is not, or the worker is to end.
        """
        if now or time.monotonic() >= self._ask_at or self.trainer.stop.is_set():
            state = self._reach(lambda: self.trainer.jobs.states([self.job.id])).get(self.job.id)
            self._ask_at = time.monotonic() + _ASK_SECONDS
            self.status = state.status if state else "deleted"
            if state is None or (state.status, state.worker) != ("running", self.trainer.worker):
                raise LeftError

    def _reach(self, action: Callable[[], Any]) -> Any:
        """Do something with the database; while it does not answer, as where it is on a full disk, nothing goes on.

        Raises:
            LeftError: The worker is to end.
        """
        while not self.trainer.stop.is_set():
            try:
                return action()
            except QueueUnavailableError as error:
                note("database_away", logging.WARNING, reason=error.message)
                self.trainer.stop.wait(_AWAY_SECONDS)
        raise LeftError

    def tell(self, message: str, **options: Any) -> None:
        """Tell the job's owner something, if the disk lets one."""
        with contextlib.suppress(PrefixError):
            self.folder.add_event(message, **options)


def note(event: str, level: int = logging.INFO, error: Exception | None = None, **fields: Any) -> None:
    """Write a line of the worker's log; with the traceback of an error that was not foreseen."""
    _log.log(level, event, exc_info=error, extra={"fields": fields})


# --- a run -----------------------------------------------------------------------------------------------------------


def open_job(
    job: Job, folder: JobFolder, backbone: Backbone, on_progress: OnProgress
) -> contextlib.AbstractContextManager[Run]:
    """The run of a job, ready to train; it goes on where an earlier worker left it.

    Args:
        job: What was asked for.
        folder: Its folder, which nobody else uses.
        backbone: What it is trained on.
        on_progress: Called while a document's questions and answers are made.

    Raises:
        BackboneError: The job is for other weights.
        PrefixError: As `prepare` and `open_memory` do.
    """
    if job.fingerprint and not fingerprints_match(job.fingerprint, backbone.fingerprint):
        message = "the worker's model has other weights than the server's."
        raise BackboneError(message, hint="give both the same backbone.")
    inputs = {path.name.partition(".")[0]: str(path) for path in folder.inputs.iterdir()}
    save_every = min(_MOST_LOST, max(1, int(job.config.get("max_steps", 0)) // _MOST_SAVES))
    values = {**job.config, **inputs, "backbone": backbone.name, "output": str(folder.run), "save_every": save_every}
    if job.kind == "document":
        return open_memory(DistillConfig(**{"questions": SELF, **values}), backbone, _Reporting(on_progress))
    return prepare(TrainConfig(**values), backbone, resume=True)


class Reporter:
    """Reports the events of a run.

    Args:
        job: What is trained.
        folder: Its folder.
        run: Ready or resumed.
    """

    def __init__(self, job: Job, folder: JobFolder, run: Run) -> None:
        self._job, self._folder, self._loop = job, folder, run.loop
        self._trained_tokens = sum(event.get("target_tokens", 0) for event in run.events)
        self._loss: float | None = None
        self._opened, self._begun_at = time.monotonic(), run.loop.state.step

    def report(self, event: Event) -> None:
        """Report an event, right after it happened.

        Raises:
            PrefixError: It cannot be written.
        """
        step, total = self._loop.state.step, self._loop.state.total_steps
        match event["event"]:
            case "start":
                self._folder.add_event("Training has started.", key="started")
            case "resume":
                self._folder.add_event(f"Training goes on at step {step}/{total}.")
            case "step":
                self._trained_tokens += event["target_tokens"]
                self._loss = event["loss_per_token"]
                if step % -(-total // _MOST_STEPS_TOLD) == 0 or step in (1, total):
                    # By what the steps of this worker took, with their evaluations and states.
                    seconds = (time.monotonic() - self._opened) / (step - self._begun_at)
                    figures = {"learning_rate": event["lr"], "seconds": event["seconds"]}
                    figures |= {"seconds_left": (total - step) * seconds, "trained_tokens": self._trained_tokens}
                    figures |= self._loop.state.best() if self._loop.state.best_step else {}
                    self._add_metrics("training", {"train_loss": event["loss_per_token"], **figures})
            case "evaluation":
                keep_checkpoint(self._job, self._folder, self._loop, event, self._loss)
                if "loss" in event:
                    self._add_metrics("validation", {"valid_loss": event["loss"], **self._loop.state.best()})

    def _add_metrics(self, what: str, figures: dict[str, float]) -> None:
        step, total = self._loop.state.step, self._loop.state.total_steps
        message = f"Step {step}/{total}: {what} loss={next(iter(figures.values())):.2f}"
        self._folder.add_event(message, data={"step": step, "total_steps": total, **figures}, key=f"{what}/{step}")


class _Reporting(Console):
    """Reports progress to a function instead of people."""

    def __init__(self, on_progress: OnProgress) -> None:
        super().__init__(quiet=True)
        self._on_progress = on_progress

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None, *, start: int = 0) -> Iterator[Progress]:
        """Report the progress of the block."""
        self._on_progress(title, start, total)
        yield Progress(lambda step, figures: self._on_progress(title, step, total))
