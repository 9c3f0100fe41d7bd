"""Publish what a job has trained: put its prefix, checked, into the folder that servers serve from; and take it back.

A published file is whole from the moment it has its name, and its header says whose it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.jobs.checkpoints import checkpoints
from prefixtune.jobs.executor import JobFailedError, JobPausedError
from prefixtune.jobs.files import FileStore, result_file_id
from prefixtune.jobs.job import Job, JobError, JobResult
from prefixtune.jobs.queue import JobQueue
from prefixtune.prefix.file import is_unread
from prefixtune.prefix.folder import (
    Signature,
    change_folder,
    list_names,
    path_of,
    remove_abandoned_copies,
    signature_of,
)
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, read_outline, save_prefix
from prefixtune.training.folder import EVENTS_FILE, PREFIX_FILE, Event, read_events
from prefixtune.utils.files import flush_to_disk, fsync, reporting_write_errors, work_folder

__all__ = ["METRICS_FILE", "metrics_csv", "publish", "published_by", "tidy"]


METRICS_FILE = "step_metrics.csv"
"""What the file of a job's metrics is called, as OpenAI calls it."""
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "seconds")
_LOCK_SECONDS = 30.0
"""An upload holds the lock of the folder until it is on the disk. A job that does not get it in time is paused."""


def publish(
    job: Job,
    run: Path,
    backbone: Backbone,
    prefixes: Path,
    files: FileStore,
    *,
    max_bytes: int = 2**30,
) -> JobResult:
    """Serve what a job has trained under the job's name, and store its metrics for its owner.

    May be called again for the same job, as after a kill. All is written and checked beside the files that are served;
    others who change the folder wait for the renames alone. The checkpoints come first, so that all is there once the
    job's name answers.

    Args:
        job: What was asked for.
        run: The folder of its run, which has ended.
        backbone: The model that it was trained on.
        prefixes: The folder that servers serve from.
        files: Where the metrics are stored.
        max_bytes: Largest prefix, in the backbone's dtype; see `cache_mib` of the server.

    Raises:
        JobFailedError: The prefix cannot be served; nothing is published.
        JobPausedError: Another file has its name, or it is too large; nothing is published.
        FolderBusyError: Others change the folder of prefixes; nothing is published.
        PrefixError: A file cannot be written, as on a full disk, or the run's log is damaged; nothing is published.
    """
    events = read_events(run / EVENTS_FILE)
    validator = PrefixValidator(backbone, max_bytes)
    prefix = _result(job, run)
    metrics = _store_metrics(job, events, files)
    with reporting_write_errors(path_of(prefixes, job.name)):
        prefixes.mkdir(parents=True, exist_ok=True)
        with work_folder(prefixes, path_of(prefixes, job.name).name) as made:
            names = []
            for checkpoint in checkpoints(job, run):
                shutil.copyfile(checkpoint.path, path_of(made, checkpoint.name))
                names.append(checkpoint.name)
            save_prefix(path_of(made, job.name), prefix, dtype=prefix.dtype)
            names.append(job.name)
            for name in names:
                _check(path_of(made, name), name, validator)
            flush_to_disk(*(path_of(made, name) for name in names))
            with change_folder(prefixes, _LOCK_SECONDS):
                _move(job, names, made, prefixes)
        fsync(prefixes)
    return JobResult(
        name=job.name,
        trained_tokens=sum(event["target_tokens"] for event in _of("step", events)),
        steps=max((event["step"] for event in _of("step", events)), default=0),
        result_files=[metrics],
        best_loss=next((event["best_loss"] for event in reversed(_of("evaluation", events)) if "loss" in event), None),
    )


def _result(job: Job, run: Path) -> Prefix:
    """The run's best prefix, with the job in its header.

    Raises:
        CheckpointError: The disk does not let it be read.
        JobFailedError: It is broken.
    """
    path = run / PREFIX_FILE
    try:
        prefix = read_artifact(path)
    except CheckpointError as error:
        if is_unread(error):
            raise
        raise _unusable(error, path) from error
    header = {**prefix.header, "job": JobOrigin(id=job.id, owner=job.owner).model_dump(exclude_none=True)}
    initialization = header.get("initialization")
    if isinstance(initialization, Mapping) and initialization.get("kind") == "prefix":
        # The name that the owner knows, not that of the job's copy.
        header["initialization"] = {**initialization, "file": job.model}
    return Prefix(prefix.layers, header, prefix.head)


def _check(path: Path, name: str, validator: PrefixValidator) -> None:
    """Check a file as an upload is checked.

    Raises:
        CheckpointError: The disk does not let it be read.
        JobFailedError: It cannot be served.
        JobPausedError: It is larger than servers take.
    """
    if read_outline(path).num_parameters * validator.backbone.dtype.itemsize > validator.max_bytes:
        raise JobPausedError(f"the new model is larger than the {validator.max_bytes:,} bytes that servers take")
    try:
        validator.read_header(path)
        validator.load(path, name)
    except CheckpointError as error:
        if is_unread(error):
            raise
        raise _unusable(error, path) from error


def _move(job: Job, names: list[str], made: Path, prefixes: Path) -> None:
    """Give files their names, in this order, the result's last; a checkpoint whose name another file has is left out.

    A checkpoint of the same owner's that stayed without its result is replaced.

    Raises:
        JobPausedError: Another file has the result's name.
        OSError: One cannot be moved; those that were are replaced when the job is published again.
    """
    if not _is_free(path_of(prefixes, job.name), job):
        raise JobPausedError(f"another model is served as {job.name!r} now")
    for name in names:
        path = path_of(prefixes, name)
        if _is_free(path, job) or _is_left_over(path, job):
            os.replace(path_of(made, name), path)


def _unusable(error: CheckpointError, path: Path) -> JobFailedError:
    reason = error.message.replace(str(path), path.name)
    return JobFailedError(JobError(code="invalid_prefix", message=f"the trained prefix cannot be served: {reason}"))


def _is_free(path: Path, job: Job) -> bool:
    return signature_of(path) is None or published_by(path) == job.id


def _is_left_over(path: Path, job: Job) -> bool:
    """Whether a file beside the job's own name, which is free, is a checkpoint of an earlier job of its owner."""
    origin = _origin(path)
    return origin is not None and origin.owner == job.owner and origin.step is not None


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics_csv(events: Iterable[Event]) -> str:
    """The figures of a run's steps as CSV; losses are in nats per token, `seconds` are those of the step."""
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "step":
            rows[event["step"]] = {
                "step": event["step"],
                "train_loss": event["loss_per_token"],
                "learning_rate": event["lr"],
                "seconds": event["seconds"],
            }
        elif event["event"] == "evaluation" and "loss" in event:
            rows.setdefault(event["step"], {"step": event["step"]})["valid_loss"] = event["loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return text.getvalue()


def _store_metrics(job: Job, events: Iterable[Event], files: FileStore) -> str:
    """Store the metrics for their owner; returns the file's id, the same each time.

    Raises:
        PrefixError: They cannot be written.
    """
    try:
        return files.put_result(job.owner, result_file_id(job.id), METRICS_FILE, metrics_csv(events).encode()).id
    except OSError as error:
        raise PrefixError(
            f"the metrics of {job.id!r} cannot be stored: {error.strerror or error}.", hint="free some space."
        ) from error


def _of(kind: str, events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event["event"] == kind]


# --- taking it back ---------------------------------------------------------------------------------------------------


def published_by(path: Path) -> str | None:
    """The id of the job whose result, or checkpoint, a file is; None: no job's, or it cannot be read."""
    origin = _origin(path)
    return None if origin is None else origin.id


def _origin(path: Path) -> JobOrigin | None:
    with contextlib.suppress(OSError, CheckpointError):
        return job_origin(read_outline(path).header)
    return None


def tidy(queue: JobQueue, prefixes: Path, settled: MutableMapping[str, Signature]) -> list[str]:
    """Remove published files whose jobs were cancelled or failed, as where a worker was killed; returns their names.

    What killed processes were writing is removed, too.

    Args:
        queue: All jobs.
        prefixes: The folder that servers serve from.
        settled: Files that need no further look, by name, which this keeps: give the same at each call, empty at first.

    Raises:
        QueueUnavailableError: The database cannot be reached.
        PrefixError: A file cannot be removed.
    """
    found: dict[str, tuple[str, Signature]] = {}
    try:
        names = list_names(prefixes)
    except OSError:
        return []
    remove_abandoned_copies(prefixes)
    for name in settled.keys() - names:
        del settled[name]
    for name in sorted(names):
        signature = signature_of(path_of(prefixes, name))
        if signature is None or settled.get(name) == signature:
            continue
        job_id = published_by(path_of(prefixes, name))
        if job_id is None:
            settled[name] = signature
        else:
            found[name] = job_id, signature
    statuses = queue.statuses(sorted({job_id for job_id, _ in found.values()}))
    removed = []
    for name, (job_id, signature) in found.items():
        if statuses.get(job_id) in ("cancelled", "failed"):
            with change_folder(prefixes, _LOCK_SECONDS):
                path = path_of(prefixes, name)
                if published_by(path) == job_id and _remove(path):
                    removed.append(name)
        elif statuses.get(job_id) in ("succeeded", None):
            # Of another data folder, perhaps: not ours to remove.
            settled[name] = signature
    return removed


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PrefixError(
            f"the prefix {path.name!r} cannot be removed: {error.strerror or error}.", hint="check its permissions."
        ) from error
    return True
