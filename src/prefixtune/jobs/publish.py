"""Publish what a job has trained: put its prefix, checked, into the folder that servers serve from; and take it back.

A published file is whole from the moment it has its name, and its header says whose it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job, checkpoint_name
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, read_outline, save_prefix
from prefixtune.training.run_folder import PREFIX_FILE, Event
from prefixtune.utils.files import atomic_files
from prefixtune.utils.locks import FolderBusyError, change_folder

if TYPE_CHECKING:
    # A server reads checkpoints, and does without it.
    from prefixtune.training.loop import TrainLoop

_KEPT = 3
"""How many are kept: the last ones."""
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "seconds")
_LOCK_SECONDS = 30.0
"""An upload holds the lock of the folder until it is on the disk. A job that does not get it in time is paused."""


def publish(
    job: Job, folder: JobFolder, backbone: Backbone, prefixes: Path, files: FileStore, *, max_bytes: int = 2**30
) -> None:
    """Serve what a job has trained under the job's name, and store its metrics for its owner.

    May be called again for the same job, as after a kill. All is written and checked beside the files that are served;
    others who change the folder wait for the renames alone. The checkpoints come first, so that all is there once the
    job's name answers; one whose name another file has is left out.

    Args:
        job: What was asked for.
        folder: Its folder; its run has ended.
        backbone: The model that it was trained on.
        prefixes: The folder that servers serve from.
        files: Where the metrics are stored.
        max_bytes: Largest prefix, in the backbone's dtype; see `cache_mib` of the server.

    Raises:
        CheckpointError: The prefix cannot be served; nothing is published.
        FolderBusyError: Another file has its name, or others change the folder of prefixes; nothing is published.
        OSError, PrefixError: A file cannot be written, as on a full disk; nothing is published.
    """
    files.put_metrics(job.owner, job.id, metrics_csv(event.data for event in folder.events() if event.data).encode())
    prefix, validator = read_artifact(folder.run / PREFIX_FILE), PrefixValidator(backbone, max_bytes)
    header = {**prefix.header, **_origin_field(job)}
    if (start := header.get("initialization") or {}).get("kind") == "prefix":
        # The name that the owner knows, not that of the job's copy.
        header["initialization"] = {**start, "file": job.model}
    with contextlib.ExitStack() as changing, atomic_files(prefixes) as made:
        for one in checkpoints(job, folder.checkpoints):
            shutil.copy2(one.path, made)
        save_prefix(path_of(made, job.name), Prefix(prefix.layers, header, prefix.head), dtype=prefix.dtype)
        for path in made.iterdir():
            # As an upload is checked.
            validator.read_header(path)
            validator.load(path, path.stem)
        changing.enter_context(change_folder(prefixes, _LOCK_SECONDS))
        for path in [*made.iterdir()]:
            if (prefixes / path.name).exists() and not _is_from(job, prefixes / path.name, or_left=True):
                path.unlink(missing_ok=True)
        if not path_of(made, job.name).exists():
            raise FolderBusyError(f"another model is served as {job.name!r} now; delete it first.")


def metrics_csv(figures: Iterable[dict[str, Any]]) -> str:
    """The figures of steps as CSV; losses are in nats per token, `seconds` are those of the step."""
    rows: dict[int, dict[str, Any]] = {}
    for one in figures:
        rows.setdefault(one["step"], {}).update(one)
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return text.getvalue()


# --- whose a file is --------------------------------------------------------------------------------------------------


def _origin_field(job: Job, step: int | None = None) -> dict[str, Any]:
    return {"job": JobOrigin(id=job.id, owner=job.owner, step=step).model_dump(exclude_none=True)}


def _is_from(job: Job, path: Path, *, or_left: bool = False) -> bool:
    """Whether a job made a file, as far as that can be read; or its owner's, a checkpoint left without its result."""
    with contextlib.suppress(OSError, CheckpointError):
        if origin := job_origin(read_outline(path).header):
            return origin.id == job.id or (or_left and origin.owner == job.owner and origin.step is not None)
    return False


def take_back(job: Job, prefixes: Path) -> list[str]:
    """Remove what a job has published, as of one that was cancelled in the same moment; returns the files' names.

    Raises:
        OSError: A file cannot be removed.
        PrefixError: Others change the folder for too long.
    """
    with change_folder(prefixes, _LOCK_SECONDS):
        files = [path_of(prefixes, job.name), *prefixes.glob(path_of(prefixes, checkpoint_name(job.name, "*")).name)]
        removed = [path for path in files if _is_from(job, path)]
        for path in removed:
            path.unlink(missing_ok=True)
    return [path.name for path in removed]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The prefix of one evaluation.

    Attributes:
        step: Optimizer steps taken.
        path: Its file; its name is what it is served as once the job has succeeded.
        created: When it was stored, in seconds since 1970.
        metrics: `train_loss` of this step and, with a validation file, `valid_loss`, in nats per token.
    """

    step: int
    path: Path
    created: int
    metrics: dict[str, float]


def keep_checkpoint(job: Job, folder: JobFolder, loop: TrainLoop, event: Event, train_loss: float | None) -> None:
    """Store the prefix of an evaluation that has just happened; the oldest one makes room for it.

    Args:
        job: What the run trains for.
        folder: The job's.
        loop: The run's.
        event: The evaluation.
        train_loss: Of the last step.

    Raises:
        PrefixError: It cannot be written.
    """
    prefix, step = loop.snapshot(), event["step"]
    if prefix is None:
        return
    training = {**prefix.header["training"], "dev_loss": event.get("loss"), "train_loss": train_loss}
    header = {**prefix.header, "training": training, **_origin_field(job, step)}
    path = path_of(folder.checkpoints, checkpoint_name(job.name, step))
    save_prefix(path, Prefix(prefix.layers, header, prefix.head), dtype=loop.config.save_dtype)
    for old in checkpoints(job, folder.checkpoints)[:-_KEPT]:
        old.path.unlink(missing_ok=True)


def checkpoints(job: Job, folder: Path) -> list[Checkpoint]:
    """The checkpoints of a job in a folder, the oldest first; reads their headers only. Broken files are left out.

    Args:
        job: What was asked for.
        folder: The job's own (`JobFolder.checkpoints`) or, once it has succeeded, the one that is served from.
    """
    found = []
    for path in folder.glob(path_of(folder, checkpoint_name(job.name, "*")).name):
        # One that is replaced or removed meanwhile.
        with contextlib.suppress(OSError, CheckpointError):
            header, created = read_outline(path).header, int(path.stat().st_mtime)
            origin, training = job_origin(header), header.get("training") or {}
            if origin is not None and origin.id == job.id and origin.step is not None:
                losses = {"train_loss": training.get("train_loss"), "valid_loss": training.get("dev_loss")}
                metrics = {name: loss for name, loss in losses.items() if isinstance(loss, float)}
                found.append(Checkpoint(origin.step, path, created, metrics))
    return sorted(found, key=lambda one: one.step)
