"""The prefixes of a job's last evaluations, each a file like its result and served beside it: NAME.step-N."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.errors import CheckpointError
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job, checkpoint_name
from prefixtune.prefix.folder import ENDING
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_outline, save_prefix
from prefixtune.training.run_folder import Event

if TYPE_CHECKING:
    # A server reads checkpoints, and does without it.
    from prefixtune.training.loop import TrainLoop

_FOLDER, _KEPT = "checkpoints", 3
"""In the folder of a job's run; and how many are kept: the last ones."""
_STEP_NAME = re.compile(r"step-(\d{1,9})")


@dataclass(frozen=True)
class Checkpoint:
    """The prefix of one evaluation.

    Attributes:
        step: Optimizer steps taken.
        created: When it was stored, in seconds since 1970.
        name: What it is served as once the job has succeeded.
        path: Its file.
        metrics: `train_loss` of this step and, with a validation file, `valid_loss`, in nats per token.
    """

    step: int
    created: int
    name: str
    path: Path
    metrics: dict[str, float]


def keep_checkpoint(job: Job, run: Path, loop: TrainLoop, event: Event, train_loss: float | None) -> None:
    """Store the prefix of an evaluation that has just happened; the oldest one makes room for it.

    Args:
        job: What the run trains for.
        run: The run's folder.
        loop: It.
        event: The evaluation.
        train_loss: Of the last step.

    Raises:
        PrefixError: It cannot be written.
    """
    prefix = loop.snapshot()
    if prefix is None:
        return
    training = {**prefix.header["training"], "dev_loss": event.get("loss"), "train_loss": train_loss}
    origin = JobOrigin(id=job.id, owner=job.owner, step=event["step"])
    header = {**prefix.header, "training": training, "job": origin.model_dump(exclude_none=True)}
    path = run / _FOLDER / f"step-{event['step']}{ENDING}"
    save_prefix(path, Prefix(prefix.layers, header, prefix.head), dtype=loop.config.save_dtype)
    for old in _files(run / _FOLDER)[:-_KEPT]:
        old.unlink(missing_ok=True)


def checkpoints(job: Job, run: Path) -> list[Checkpoint]:
    """The checkpoints of a job, the oldest first; reads their headers only. Broken files are left out.

    Args:
        job: What was asked for.
        run: The run's folder.
    """
    found = []
    for path in _files(run / _FOLDER):
        # One that is replaced or removed meanwhile.
        with contextlib.suppress(OSError, CheckpointError):
            header, created = read_outline(path).header, int(path.stat().st_mtime)
            origin = job_origin(header)
            if origin is not None and origin.id == job.id and origin.step is not None:
                name = checkpoint_name(job.name, origin.step)
                found.append(Checkpoint(origin.step, created, name, path, _metrics(header)))
    return found[-_KEPT:]


def remove_checkpoints(folder: JobFolder) -> None:
    """Remove a job's own copies of its checkpoints, as far as that can be done."""
    shutil.rmtree(folder.run / _FOLDER, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """The files of checkpoints, in the order of their steps."""
    steps = {}
    for path in folder.glob(f"step-*{ENDING}"):
        if match := _STEP_NAME.fullmatch(path.name.removesuffix(ENDING)):
            steps[path] = int(match[1])
    return sorted(steps, key=steps.__getitem__)


def _metrics(header: Mapping[str, Any]) -> dict[str, float]:
    training = header.get("training") or {}
    losses = {"train_loss": training.get("train_loss"), "valid_loss": training.get("dev_loss")}
    return {name: float(loss) for name, loss in losses.items() if isinstance(loss, int | float)}
