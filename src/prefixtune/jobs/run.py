"""A job's run: ready or resumed, and what its owner is told of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.distill import open_memory
from prefixtune.errors import BackboneError
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job
from prefixtune.jobs.publish import keep_checkpoint
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.prepare import prepare
from prefixtune.training.run import Run
from prefixtune.training.run_folder import Event
from prefixtune.utils.console import Console, Progress

_MOST_SAVES, _MOST_LOST = 50, 100
"""A run's state is saved so often, and at least after so many steps: a kill loses no more."""
_MOST_STEPS_TOLD = 2000
"""Of a longer run, every second step is an event, or every third ..."""
OnProgress = Callable[[str, int, int | None], None]
"""Called with what is being prepared, how much of it is done, and how much there is."""


@contextlib.contextmanager
def open_job(job: Job, folder: JobFolder, backbone: Backbone, on_progress: OnProgress) -> Iterator[Run]:
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
        raise BackboneError(
            "the worker's model has other weights than the server's.", hint="give both the same backbone."
        )
    inputs = {path.name.partition(".")[0]: str(path) for path in folder.inputs.iterdir()}
    values: dict[str, Any] = {**job.config, "backbone": backbone.name, "seed": job.seed, "output": str(folder.run)}
    values["save_every"] = min(_MOST_LOST, max(1, int(values.get("max_steps", 0)) // _MOST_SAVES))
    if "start" in inputs:
        values |= {"initialization": "prefix", "init_prefix": inputs.pop("start")}
    values |= inputs
    if job.kind == "document":
        with open_memory(DistillConfig(**{"questions": SELF, **values}), backbone, _Reporting(on_progress)) as run:
            yield run
    else:
        with prepare(TrainConfig(**values), backbone, resume=True) as run:
            yield run


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
                self._events.add("Training has started.", key="started")
            case "resume":
                self._events.add(f"Training goes on at step {step}/{total}.")
            case "step":
                self._trained_tokens += event["target_tokens"]
                self._loss = event["loss_per_token"]
                if step % -(-total // _MOST_STEPS_TOLD) == 0 or step in (1, total):
                    # By what the steps of this worker took, with their evaluations and states.
                    seconds = (time.monotonic() - self._opened) / (step - self._begun_at)
                    figures = {"learning_rate": event["lr"], "seconds": event["seconds"]}
                    figures |= {"seconds_left": (total - step) * seconds, "trained_tokens": self._trained_tokens}
                    self._add_metrics("training", "train_loss", event["loss_per_token"], f"step/{step}", **figures)
            case "evaluation":
                keep_checkpoint(self._job, self._folder, self._loop, event, self._loss)
                if "loss" in event:
                    figures = {name: event[name] for name in ("best_loss", "best_step")}
                    self._add_metrics("validation", "valid_loss", event["loss"], f"evaluation/{step}", **figures)

    def _add_metrics(self, what: str, name: str, loss: float, key: str, **figures: float) -> None:
        step, total = self._loop.state.step, self._loop.state.total_steps
        data = {"step": step, "total_steps": total, name: loss, **figures}
        self._events.add(f"Step {step}/{total}: {what} loss={loss:.2f}", data=data, key=key)


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
