"""Publish what a job has trained: put its prefix, checked, into the folder that servers serve from; and take it back.

A published file is whole from the moment it has its name, and its header says whose it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.files import FileStore, result_file_id
from prefixtune.jobs.folder import JobFolder
from prefixtune.jobs.job import Job, JobPausedError, JobResult, checkpoint_name
from prefixtune.prefix.folder import ENDING, change_folder, path_of
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, read_outline, save_prefix
from prefixtune.training.run_folder import PREFIX_FILE, Event
from prefixtune.utils.files import flush_to_disk, fsync, reporting_write_errors, work_folder

if TYPE_CHECKING:
    # A server reads checkpoints, and does without it.
    from prefixtune.training.loop import TrainLoop

_KEPT = 3
"""How many are kept: the last ones."""
METRICS_FILE = "step_metrics.csv"
"""What the file of a job's metrics is called, as OpenAI calls it."""
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "seconds")
_LOCK_SECONDS = 30.0
"""An upload holds the lock of the folder until it is on the disk. A job that does not get it in time is paused."""


def publish(
    job: Job, folder: JobFolder, backbone: Backbone, prefixes: Path, files: FileStore, *, max_bytes: int = 2**30
) -> JobResult:
    """Serve what a job has trained under the job's name, and store its metrics for its owner.

    May be called again for the same job, as after a kill. All is written and checked beside the files that are served;
    others who change the folder wait for the renames alone. The checkpoints come first, so that all is there once the
    job's name answers.

    Args:
        job: What was asked for.
        folder: Its folder; its run has ended.
        backbone: The model that it was trained on.
        prefixes: The folder that servers serve from.
        files: Where the metrics are stored.
        max_bytes: Largest prefix, in the backbone's dtype; see `cache_mib` of the server.

    Raises:
        CheckpointError: The prefix cannot be served; nothing is published.
        JobPausedError: Another file has its name; nothing is published.
        FolderBusyError: Others change the folder of prefixes; nothing is published.
        OSError, PrefixError: A file cannot be written, as on a full disk; nothing is published.
    """
    figures = [event.data for event in JobEvents(folder).read() if event.data]
    metrics = files.put_result(job.owner, result_file_id(job.id), METRICS_FILE, metrics_csv(figures).encode())
    run = folder.run
    prefix, validator = read_artifact(run / PREFIX_FILE), PrefixValidator(backbone, max_bytes)
    with reporting_write_errors(path_of(prefixes, job.name)):
        prefixes.mkdir(parents=True, exist_ok=True)
        with work_folder(prefixes, path_of(prefixes, job.name).name) as made:
            found = checkpoints(job, run)
            for checkpoint in found:
                shutil.copyfile(checkpoint.path, path_of(made, checkpoint.name))
            save_prefix(path_of(made, job.name), _owned(prefix, job), dtype=prefix.dtype)
            names = [*(checkpoint.name for checkpoint in found), job.name]
            for name in names:
                # As an upload is checked.
                validator.read_header(path_of(made, name))
                validator.load(path_of(made, name), name)
            flush_to_disk(*(path_of(made, name) for name in names))
            with change_folder(prefixes, _LOCK_SECONDS):
                _move(job, names, made, prefixes)
        fsync(prefixes)
    best = [one["best_loss"] for one in figures if "valid_loss" in one]
    last = [one for one in figures if "train_loss" in one][-1]
    return JobResult(
        name=job.name,
        trained_tokens=last["trained_tokens"],
        steps=last["step"],
        result_files=[metrics.id],
        best_loss=best[-1] if best else None,
    )


def _owned(prefix: Prefix, job: Job) -> Prefix:
    """A run's prefix, with the job in its header."""
    header = {**prefix.header, "job": JobOrigin(id=job.id, owner=job.owner).model_dump(exclude_none=True)}
    if (start := header.get("initialization") or {}).get("kind") == "prefix":
        # The name that the owner knows, not that of the job's copy.
        header["initialization"] = {**start, "file": job.model}
    return Prefix(prefix.layers, header, prefix.head)


def _move(job: Job, names: list[str], made: Path, prefixes: Path) -> None:
    """Give files their names, in this order, the result's last; a checkpoint whose name another file has is left out.

    A checkpoint of the same owner's that stayed without its result is replaced.
    """

    def is_free(name: str) -> bool:
        origin = _origin(path_of(prefixes, name))
        if origin is None:
            return not path_of(prefixes, name).exists()
        return origin.id == job.id or (origin.owner == job.owner and origin.step is not None)

    if not is_free(job.name):
        raise JobPausedError(f"another model is served as {job.name!r} now")
    for name in filter(is_free, names):
        os.replace(path_of(made, name), path_of(prefixes, name))


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


# --- checkpoints ------------------------------------------------------------------------------------------------------


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
    path = run / "checkpoints" / f"{event['step']:09}{ENDING}"
    save_prefix(path, Prefix(prefix.layers, header, prefix.head), dtype=loop.config.save_dtype)
    for old in _files(run)[:-_KEPT]:
        old.unlink(missing_ok=True)


def checkpoints(job: Job, run: Path) -> list[Checkpoint]:
    """The checkpoints of a job, the oldest first; reads their headers only. Broken files are left out.

    Args:
        job: What was asked for.
        run: The run's folder.
    """
    found = []
    for path in _files(run):
        # One that is replaced or removed meanwhile.
        with contextlib.suppress(OSError, CheckpointError):
            header, created = read_outline(path).header, int(path.stat().st_mtime)
            origin = job_origin(header)
            if origin is not None and origin.id == job.id and origin.step is not None:
                name = checkpoint_name(job.name, origin.step)
                training = header.get("training") or {}
                losses = {"train_loss": training.get("train_loss"), "valid_loss": training.get("dev_loss")}
                metrics = {name: loss for name, loss in losses.items() if isinstance(loss, float)}
                found.append(Checkpoint(origin.step, created, name, path, metrics))
    return found[-_KEPT:]


def remove_checkpoints(folder: JobFolder) -> None:
    """Remove a job's own copies of its checkpoints, as far as that can be done."""
    shutil.rmtree(folder.run / "checkpoints", ignore_errors=True)


def _files(run: Path) -> list[Path]:
    """The files of checkpoints, in the order of their steps."""
    return sorted((run / "checkpoints").glob(f"*{ENDING}"))


# --- taking it back ---------------------------------------------------------------------------------------------------


def published_by(path: Path) -> str | None:
    """The id of the job whose result, or checkpoint, a file is; None: no job's, or it cannot be read."""
    origin = _origin(path)
    return None if origin is None else origin.id


def _origin(path: Path) -> JobOrigin | None:
    with contextlib.suppress(OSError, CheckpointError):
        return job_origin(read_outline(path).header)
    return None


def take_back(job: Job, prefixes: Path) -> list[str]:
    """Remove what a job has published, as of one that was cancelled in the same moment; returns the files' names.

    Raises:
        OSError: A file cannot be removed.
        PrefixError: Others change the folder for too long.
    """
    paths = [path_of(prefixes, job.name), *prefixes.glob(f"{job.name}.step-*")]
    removed = [path for path in paths if published_by(path) == job.id]
    if removed:
        with change_folder(prefixes, _LOCK_SECONDS):
            for path in removed:
                if published_by(path) == job.id:
                    path.unlink(missing_ok=True)
    return [path.name for path in removed]
