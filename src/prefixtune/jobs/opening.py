"""From a job to a run that trains: its configuration with the paths of its folder, and the run, ready or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.distill import open_memory
from prefixtune.errors import BackboneError, DataError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.inputs import InputName, find_input
from prefixtune.jobs.job import Job
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.opening import open_run
from prefixtune.training.runs import Run
from prefixtune.utils.console import Console, Progress

__all__ = ["OnProgress", "open_job"]


OnProgress = Callable[[str, int, int | None], None]
"""Called with what is being prepared, how much of it is done, and how much there is; what it raises ends the work."""


@contextlib.contextmanager
def open_job(job: Job, folder: JobFolder, backbone: Backbone, on_progress: OnProgress) -> Iterator[Run]:
    """The run of a job, ready to join a group; it goes on where an earlier worker left it.

    Args:
        job: What was asked for.
        folder: Its folder, which nobody else uses.
        backbone: Of the group.
        on_progress: Called while a document's questions and answers are made.

    Raises:
        BackboneError: The job is for other weights.
        PrefixError: As `open_run` and `open_memory` do.
    """
    if job.fingerprint and not fingerprints_match(job.fingerprint, backbone.fingerprint):
        raise BackboneError(
            "the worker's model has other weights than the server's.", hint="give both the same backbone."
        )
    opened: contextlib.AbstractContextManager[Run]
    if job.kind == "document":
        opened = open_memory(_memory_config(job, folder, backbone), backbone, _Reporting(on_progress))
    else:
        opened = open_run(_train_config(job, folder, backbone), backbone)
    with opened as run:
        yield run


def _train_config(job: Job, folder: JobFolder, backbone: Backbone) -> TrainConfig:
    values = {**_values(job, folder, backbone), "train": _needed(folder, "train")}
    if dev := find_input(folder, "dev"):
        values["dev"] = str(dev)
    return TrainConfig(**values)


def _memory_config(job: Job, folder: JobFolder, backbone: Backbone) -> DistillConfig:
    questions = find_input(folder, "questions")
    values = {**_values(job, folder, backbone), "document": _needed(folder, "document")}
    return DistillConfig(**{**values, "questions": str(questions) if questions else SELF})


def _values(job: Job, folder: JobFolder, backbone: Backbone) -> dict[str, Any]:
    """What the configurations of all jobs have."""
    values = {**job.config, "backbone": backbone.name, "seed": job.seed, "output": str(folder.run)}
    if start := find_input(folder, "start"):
        values |= {"initialization": "prefix", "init_prefix": str(start)}
    if values.get("report_to"):
        values.setdefault("run_name", job.name)
    return values


def _needed(folder: JobFolder, name: InputName) -> str:
    path = find_input(folder, name)
    if path is None:
        raise DataError("the file to train on is gone.", hint="upload it again.")
    return str(path)


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
