"""A job that trains: its open run, what its owner is told of it, and when its state is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future

from prefixtune.jobs.attempts import SUSPICIOUS_ATTEMPTS, forget_attempts, num_attempts
from prefixtune.jobs.checkpoints import CheckpointKeeper
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.failures import is_temporary
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job, JobResult
from prefixtune.jobs.run_log import RunLog
from prefixtune.training.folder import EVENTS_FILE, Event
from prefixtune.training.runs import Run
from prefixtune.utils.locks import acquire_lock

__all__ = ["ActiveJob", "Claim", "hold_folder"]


_MOST_STEPS_TOLD = 2000
"""Of a longer run, every second step is an event, or every third ..."""
_SAVE_SECONDS = 1.0
"""Shortest time between two states that are saved in case of a kill."""
_SAVE_SHARE = 20
"""A state is saved after this many times as long as saving takes."""
_PROGRESS_SECONDS = 0.5
_SMOOTHING = 0.2
"""Weight of the last step in the seconds that computing a step takes."""
_LOCK = ".lock"
_log = logging.getLogger("prefixtune.jobs")


@dataclasses.dataclass(eq=False)
class Claim:
    """A claim of a job, which waits for the job's end.

    Attributes:
        job: What is to be trained.
        token: Tells this claim of the job from others.
        future: What it left, or why it failed.
        submitted: When it was claimed, at the latest, by `time.monotonic()`.
    """

    job: Job
    token: str
    future: Future[JobResult] = dataclasses.field(default_factory=Future)
    submitted: float = dataclasses.field(default_factory=time.monotonic)


@contextlib.contextmanager
def hold_folder(folder: JobFolder) -> Iterator[bool]:
    """Keep a job to oneself while the block runs; yields whether nobody else has it.

    Raises:
        OSError: There is no such folder, or it cannot be written.
    """
    # Its file stays: whoever has just opened one that is removed would hold it beside another.
    lock = acquire_lock(folder.root / _LOCK, 0.0)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


class ActiveJob:
    """A job whose run is open.

    Args:
        claim: Who waits for it.
        folder: Its folder, which is held.
        run: Ready or resumed.
        events: What its owner sees.
        closing: Closes the run.
        holding: Lets the folder go.

    Attributes:
        claims: All who wait for it.
        run: As it was given, but a full disk ends nothing that it logs.
        is_suspicious: Workers have ended while they trained it.
        trained_at: When it took its last step, by `time.monotonic()`.
        publish_at: Not published before then.
    """

    def __init__(
        self,
        claim: Claim,
        folder: JobFolder,
        run: Run,
        events: JobEvents,
        *,
        closing: contextlib.ExitStack,
        holding: contextlib.ExitStack,
    ) -> None:
        self.job, self.claims = claim.job, [claim]
        self.folder, self.events = folder, events
        self.run, self._log = dataclasses.replace(run, log=self._write_line), RunLog(folder.run / EVENTS_FILE)
        self._closing, self._holding = closing, holding
        self.is_suspicious = num_attempts(folder) > SUSPICIOUS_ATTEMPTS
        self._trained_tokens = sum(event["target_tokens"] for event in run.events if event["event"] == "step")
        # Of this worker's steps: computing the next one will take as long as the last ones; evaluations and states are
        # the same for all of them. What other jobs take to join is neither.
        self._num_timed, self._step_seconds, self._other_seconds = 0, 0.0, 0.0
        self._saved, self._save_seconds = time.monotonic(), 0.0
        self._stepped = self._saved
        losses = [event["loss_per_token"] for event in run.events if event["event"] == "step"]
        self._loss: float | None = losses[-1] if losses else None
        self._told_progress = 0.0
        self._begun_at = self.step
        self._got_further = False
        self.trained_at, self.publish_at = math.inf, 0.0
        self._checkpoints = CheckpointKeeper(self.job, folder.run)
        # What could not be written the last time.
        self._failing: set[str] = set()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.run.loop.state.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps planned."""
        return self.run.loop.state.total_steps

    @property
    def got_further(self) -> bool:
        """Whether a kill would now lose less than what was done since the job was opened."""
        return self._got_further

    def record(self, event: Event) -> None:
        """Keep an event of the run, and tell the owner, as far as that can be written; the log's lines come later."""
        with self._going_on("checkpoint"):
            self._checkpoints.record(self.run.loop, event)
        self.run.record(event)
        with self._going_on("events"):
            self._tell(event)

    def _write_line(self, line: str) -> None:
        with self._going_on("log"):
            self._log.append(line)

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Train on where something cannot be written now; said once, until it can be written again."""
        try:
            yield
        except Exception as error:
            if not is_temporary(error, self.folder):
                raise
            if what not in self._failing:
                fields = {"job": self.job.id, "what": what, "reason": str(error)}
                _log.warning("not_written", extra={"fields": fields})
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def _tell(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self.events.add("Training has started.", key="started")
            self._write_progress()
        elif kind == "resume":
            self.events.add(f"Training goes on at step {event['step']}/{event['total_steps']}.")
            self._write_progress()
        elif kind == "step":
            self._record_step(event)
        elif kind == "evaluation" and "loss" in event:
            self._record_evaluation(event)
        elif kind == "save":
            self._note_saved()

    def _record_step(self, event: Event) -> None:
        now, step = time.monotonic(), event["step"]
        self._stepped = now
        weight = _SMOOTHING if self._num_timed else 1.0
        self._step_seconds += weight * (event["seconds"] - self._step_seconds)
        self._num_timed += 1
        self._trained_tokens += event["target_tokens"]
        self._loss = event["loss_per_token"]
        every = -(-self.total_steps // _MOST_STEPS_TOLD)
        if step % every == 0 or step in (1, self.total_steps):
            data = {
                "step": step,
                "total_steps": self.total_steps,
                "train_loss": event["loss_per_token"],
                "learning_rate": event["lr"],
                "seconds": event["seconds"],
            }
            message = f"Step {step}/{self.total_steps}: training loss={event['loss_per_token']:.2f}"
            self.events.add(message, data=data, key=f"step/{step}")
        if now - self._told_progress >= _PROGRESS_SECONDS or step == self.total_steps:
            self._told_progress = now
            self._write_progress()

    def _write_progress(self) -> None:
        self.events.write_progress(
            Progress(
                step=self.step,
                total_steps=self.total_steps,
                loss=self._loss,
                seconds_left=self._seconds_left(),
                updated=int(time.time()),
                trained_tokens=self._trained_tokens,
            )
        )

    def _seconds_left(self) -> float | None:
        if not self._num_timed:
            return None
        return (self.total_steps - self.step) * (self._step_seconds + self._other_seconds / self._num_timed)

    def _record_evaluation(self, event: Event) -> None:
        step = event["step"]
        data = {
            "step": step,
            "total_steps": self.total_steps,
            "valid_loss": event["loss"],
            "best_loss": event["best_loss"],
            "best_step": event["best_step"],
        }
        message = f"Step {step}/{self.total_steps}: validation loss={event['loss']:.2f}"
        self.events.add(message, data=data, key=f"evaluation/{step}")

    # --- saving and leaving -------------------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Save the state after the first step, and from time to time: a kill loses no more than that.

        Called after each step of the group, when its evaluations are over. A state that cannot be written is tried
        again later.
        """
        pause = max(_SAVE_SECONDS, _SAVE_SHARE * self._save_seconds)
        is_first = not self._got_further and "state" not in self._failing
        if is_first or time.monotonic() - self._saved >= pause:
            with self._going_on("state"):
                self.save()
            self._saved = time.monotonic()
        self._other_seconds += time.monotonic() - self._stepped

    def save(self) -> None:
        """Save the state, which is never ahead of the run's log.

        Raises:
            PrefixError: One of them cannot be written.
        """
        started = time.monotonic()
        self.write_log()
        self.run.loop.save()
        self._save_seconds = time.monotonic() - started
        self._note_saved()

    def write_log(self) -> None:
        """Write those lines of the run's log that could not be written before.

        Raises:
            PrefixError: They cannot be written now either.
        """
        self._log.flush()

    def _note_saved(self) -> None:
        self._saved = time.monotonic()
        if self.step > self._begun_at and not self._got_further:
            forget_attempts(self.folder)
            self._got_further = True

    def leave(self) -> None:
        """Save the state and how far it is, for whoever goes on.

        Raises:
            PrefixError: They cannot be written.
        """
        self.save()
        # When it goes on is not known.
        self._num_timed = 0
        self._write_progress()

    def close_run(self) -> None:
        """All steps are taken: close the run's log and trackers; the folder is still held."""
        self.trained_at = time.monotonic()
        self._closing.close()

    def release(self) -> None:
        """Close the run, and let others have the folder, whatever closing the run raises."""
        try:
            self._closing.close()
        finally:
            self._holding.close()
