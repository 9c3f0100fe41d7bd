"""From a job to a run that trains: its configuration with the paths of its folder, and the run, ready or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import DataError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.inputs import InputName, find_input
from prefixtune.jobs.job import Job
from prefixtune.training.config import TrainConfig
from prefixtune.training.opening import open_run
from prefixtune.training.runs import Run

__all__ = ["open_job", "train_config"]


def train_config(job: Job, folder: JobFolder, backbone: Backbone) -> TrainConfig:
    """The run of a job that trains on examples.

    Raises:
        ConfigError: The job's values contradict each other.
        DataError: Its file is gone.
    """
    values = _values(job, folder, backbone) | {"train": _needed(folder, "train"), "data_cache": False}
    if dev := find_input(folder, "dev"):
        values["dev"] = str(dev)
    return TrainConfig(**values)


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


@contextlib.contextmanager
def open_job(job: Job, folder: JobFolder, backbone: Backbone) -> Iterator[Run]:
    """The run of a job, ready to join a group; it goes on where an earlier worker saved it.

    Raises:
        PrefixError: As `open_run` does.
    """
    with open_run(train_config(job, folder, backbone), backbone) as run:
        yield run
