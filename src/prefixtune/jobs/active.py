"""A job that trains: its open run, what its owner is told of it, and when its state is saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from prefixtune.jobs.checkpoints import CheckpointKeeper
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job
from prefixtune.training.folder import Event
from prefixtune.training.runs import Run
from prefixtune.utils.locks import acquire_lock

__all__ = ["ActiveJob", "hold_folder"]


_MOST_STEPS_TOLD = 2000
"""Of a longer run, every second step is an event, or every third ..."""
_SAVE_SECONDS = 1.0
"""Shortest time between two states that are saved in case of a kill."""
_SAVE_SHARE = 20
"""A state is saved after this many times as long as saving takes."""
_PROGRESS_SECONDS = 0.5
_LOCK = ".lock"


@contextlib.contextmanager
def hold_folder(folder: JobFolder) -> Iterator[bool]:
    """Keep a job to oneself while the block runs; yields whether nobody else has it.

    Raises:
        OSError: There is no such folder, or it cannot be written.
    """
    # The lock's file is not deleted: another process may have it open.
    lock = acquire_lock(folder.root / _LOCK, 0.0)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


class ActiveJob:
    """A job whose run is open.

    Args:
        job: What is trained.
        folder: Its folder, which is held.
        run: Ready or resumed.
        events: What its owner sees.
        on_further: Called once a kill would lose less than what was done since the job was opened.
    """

    def __init__(
        self, job: Job, folder: JobFolder, run: Run, events: JobEvents, *, on_further: Callable[[], object]
    ) -> None:
        self.job, self.run, self.events = job, run, events
        self._on_further = on_further
        steps = [event for event in run.events if event["event"] == "step"]
        self._trained_tokens = sum(event["target_tokens"] for event in steps)
        self._loss: float | None = steps[-1]["loss_per_token"] if steps else None
        self._opened = self._saved = time.monotonic()
        self._save_seconds = 0.0
        self._told_progress = 0.0
        self._begun_at = self.step
        self._got_further = False
        self._checkpoints = CheckpointKeeper(job, folder.run)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.run.loop.state.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps planned."""
        return self.run.loop.state.total_steps

    def record(self, event: Event) -> None:
        """Keep an event of the run, and tell the owner.

        Raises:
            PrefixError: It cannot be written.
        """
        self._checkpoints.record(self.run.loop, event)
        self.run.record(event)
        self._tell(event)

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
        """By what the steps of this worker took, with their evaluations and states."""
        taken = self.step - self._begun_at
        return (self.total_steps - self.step) * (time.monotonic() - self._opened) / taken if taken else None

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

        Called after each step, when its evaluations are over.

        Raises:
            PrefixError: It cannot be written.
        """
        pause = max(_SAVE_SECONDS, _SAVE_SHARE * self._save_seconds)
        if not self._got_further or time.monotonic() - self._saved >= pause:
            started = time.monotonic()
            self.run.loop.save()
            self._save_seconds = time.monotonic() - started
            self._note_saved()

    def _note_saved(self) -> None:
        self._saved = time.monotonic()
        if self.step > self._begun_at and not self._got_further:
            self._on_further()
            self._got_further = True

    def leave(self) -> None:
        """Save the state and how far it is, for whoever goes on.

        Raises:
            PrefixError: They cannot be written.
        """
        self.run.loop.save()
        # When it goes on is not known.
        self._begun_at = self.step
        self._write_progress()
