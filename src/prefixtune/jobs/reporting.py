"""What the owner of a job that trains is told: each step as an event, how far it is, the prefix of an evaluation."""

from __future__ import annotations

import time

from prefixtune.jobs.checkpoints import keep_checkpoint
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job
from prefixtune.training.run import Run
from prefixtune.training.run_folder import Event

_MOST_STEPS_TOLD = 2000
"""Of a longer run, every second step is an event, or every third ..."""
_PROGRESS_SECONDS = 0.5


class Reporter:
    """Reports the events of a run.

    Args:
        job: What is trained.
        folder: Its folder.
        run: Ready or resumed.
        events: What its owner sees.
    """

    def __init__(self, job: Job, folder: JobFolder, run: Run, events: JobEvents) -> None:
        self._job, self._folder, self._loop, self._events = job, folder.run, run.loop, events
        steps = [event for event in run.events if event["event"] == "step"]
        self._trained_tokens = sum(event["target_tokens"] for event in steps)
        self._loss: float | None = steps[-1]["loss_per_token"] if steps else None
        self._opened, self._told = time.monotonic(), 0.0
        self._begun_at = run.loop.state.step

    def report(self, event: Event) -> None:
        """Report an event, right after it happened.

        Raises:
            PrefixError: It cannot be written.
        """
        kind = event["event"]
        if kind == "start":
            self._events.add("Training has started.", key="started")
        elif kind == "resume":
            self._events.add(f"Training goes on at step {event['step']}/{event['total_steps']}.")
        elif kind == "step":
            self._report_step(event)
        elif kind == "evaluation":
            keep_checkpoint(self._job, self._folder, self._loop, event, self._loss)
            if "loss" in event:
                figures = {name: event[name] for name in ("best_loss", "best_step")}
                self._add_metrics("validation", "valid_loss", event["loss"], f"evaluation/{event['step']}", **figures)
        now, state = time.monotonic(), self._loop.state
        if kind != "step" or now - self._told >= _PROGRESS_SECONDS or state.step == state.total_steps:
            self._told = now
            self._write_progress()

    def leave(self) -> None:
        """Say how far it is for whoever looks until it goes on, which is not known when."""
        self._begun_at = self._loop.state.step
        self._write_progress()

    def _report_step(self, event: Event) -> None:
        step, total = event["step"], self._loop.state.total_steps
        self._trained_tokens += event["target_tokens"]
        self._loss = event["loss_per_token"]
        if step % -(-total // _MOST_STEPS_TOLD) == 0 or step in (1, total):
            figures = {"learning_rate": event["lr"], "seconds": event["seconds"]}
            self._add_metrics("training", "train_loss", event["loss_per_token"], f"step/{step}", **figures)

    def _add_metrics(self, what: str, name: str, loss: float, key: str, **figures: float) -> None:
        step, total = self._loop.state.step, self._loop.state.total_steps
        data = {"step": step, "total_steps": total, name: loss, **figures}
        self._events.add(f"Step {step}/{total}: {what} loss={loss:.2f}", data=data, key=key)

    def _write_progress(self) -> None:
        step, total = self._loop.state.step, self._loop.state.total_steps
        # By what the steps of this worker took, with their evaluations and states.
        taken, seconds = step - self._begun_at, time.monotonic() - self._opened
        self._events.write_progress(
            Progress(
                step=step,
                total_steps=total,
                loss=self._loss,
                seconds_left=(total - step) * seconds / taken if taken else None,
                updated=int(time.time()),
                trained_tokens=self._trained_tokens,
            )
        )
