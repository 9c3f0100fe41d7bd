"""From a job to a run that trains: its configuration with the paths of its folder, and the run, ready or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.distill import open_memory
from prefixtune.errors import BackboneError, DataError
from prefixtune.jobs.folder import InputName, JobFolder
from prefixtune.jobs.job import Job
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.training.config import TrainConfig
from prefixtune.training.prepare import prepare
from prefixtune.training.run import Run
from prefixtune.utils.console import Console, Progress

OnProgress = Callable[[str, int, int | None], None]
"""Called with what is being prepared, how much of it is done, and how much there is."""
_MOST_SAVES, _MOST_LOST = 50, 100
"""A run's state is saved so often, and at least after so many steps: a kill loses no more."""


def check_job(job: Job, folder: JobFolder, backbone: Backbone) -> TrainConfig:
    """The configuration of a job's run.

    Args:
        job: What was asked for.
        folder: Its folder.
        backbone: What it is trained on.

    Raises:
        BackboneError: The job is for other weights.
        ConfigError: Values do not go together.
        DataError: The job's file is gone.
    """
    if job.fingerprint and not fingerprints_match(job.fingerprint, backbone.fingerprint):
        raise BackboneError(
            "the worker's model has other weights than the server's.", hint="give both the same backbone."
        )
    values: dict[str, Any] = {**job.config, "backbone": backbone.name, "seed": job.seed, "output": str(folder.run)}
    values["save_every"] = min(_MOST_LOST, max(1, int(values.get("max_steps", 0)) // _MOST_SAVES))
    if start := folder.find_input("start"):
        values |= {"initialization": "prefix", "init_prefix": str(start)}
    if values.get("report_to"):
        values.setdefault("run_name", job.name)
    if job.kind == "document":
        questions = folder.find_input("questions")
        values |= {"document": str(_needed(folder, "document")), "questions": str(questions or SELF)}
        return DistillConfig(**values)
    if dev := folder.find_input("dev"):
        values["dev"] = str(dev)
    return TrainConfig(**values, train=str(_needed(folder, "train")))


def _needed(folder: JobFolder, name: InputName) -> Path:
    path = folder.find_input(name)
    if path is None:
        raise DataError("the file to train on is gone.", hint="upload it again.")
    return path


@contextlib.contextmanager
def open_job(job: Job, folder: JobFolder, backbone: Backbone, on_progress: OnProgress) -> Iterator[Run]:
    """The run of a job, ready to train; it goes on where an earlier worker left it.

    Args:
        job: What was asked for.
        folder: Its folder, which nobody else uses.
        backbone: What it is trained on.
        on_progress: Called while a document's questions and answers are made.

    Raises:
        PrefixError: As `check_job`, `prepare` and `open_memory` do.
    """
    config = check_job(job, folder, backbone)
    opened: contextlib.AbstractContextManager[Run]
    if isinstance(config, DistillConfig):
        opened = open_memory(config, backbone, _Reporting(on_progress))
    else:
        opened = prepare(config, backbone, resume=True)
    with opened as run:
        yield run


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
