"""Publish what a job has trained: put its prefix, checked, into the folder that servers serve from; and take it back.

A published file is whole from the moment it has its name, and its header says whose it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import PrefixValidator
from prefixtune.errors import CheckpointError
from prefixtune.jobs.checkpoints import checkpoints
from prefixtune.jobs.files import FileStore, result_file_id
from prefixtune.jobs.job import Job, JobFailedError, JobPausedError, JobResult
from prefixtune.prefix.file import is_unread
from prefixtune.prefix.folder import change_folder, path_of
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix, read_artifact, read_outline, save_prefix
from prefixtune.training.run_folder import EVENTS_FILE, PREFIX_FILE, Event, read_events
from prefixtune.utils.files import flush_to_disk, fsync, reporting_write_errors, work_folder

METRICS_FILE = "step_metrics.csv"
"""What the file of a job's metrics is called, as OpenAI calls it."""
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "seconds")
_LOCK_SECONDS = 30.0
"""An upload holds the lock of the folder until it is on the disk. A job that does not get it in time is paused."""


def publish(
    job: Job, run: Path, backbone: Backbone, prefixes: Path, files: FileStore, *, max_bytes: int = 2**30
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
        OSError, PrefixError: A file cannot be written, as on a full disk; nothing is published.
    """
    events = read_events(run / EVENTS_FILE)
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "evaluation" and "loss" in event]
    metrics = files.put_result(job.owner, result_file_id(job.id), METRICS_FILE, metrics_csv(events).encode())
    validator = PrefixValidator(backbone, max_bytes)
    with reporting_write_errors(path_of(prefixes, job.name)), _checking(run):
        prefix = read_artifact(run / PREFIX_FILE)
        prefixes.mkdir(parents=True, exist_ok=True)
        with work_folder(prefixes, path_of(prefixes, job.name).name) as made:
            found = checkpoints(job, run)
            for checkpoint in found:
                shutil.copyfile(checkpoint.path, path_of(made, checkpoint.name))
            save_prefix(path_of(made, job.name), _owned(prefix, job), dtype=prefix.dtype)
            names = [*(checkpoint.name for checkpoint in found), job.name]
            for name in names:
                _check(path_of(made, name), name, validator)
            flush_to_disk(*(path_of(made, name) for name in names))
            with change_folder(prefixes, _LOCK_SECONDS):
                _move(job, names, made, prefixes)
        fsync(prefixes)
    return JobResult(
        name=job.name,
        trained_tokens=sum(event["target_tokens"] for event in steps),
        steps=max((event["step"] for event in steps), default=0),
        result_files=[metrics.id],
        best_loss=evaluations[-1]["best_loss"] if evaluations else None,
    )


def _owned(prefix: Prefix, job: Job) -> Prefix:
    """A run's prefix, with the job in its header."""
    header = {**prefix.header, "job": JobOrigin(id=job.id, owner=job.owner).model_dump(exclude_none=True)}
    initialization = header.get("initialization")
    if isinstance(initialization, Mapping) and initialization.get("kind") == "prefix":
        # The name that the owner knows, not that of the job's copy.
        header["initialization"] = {**initialization, "file": job.model}
    return Prefix(prefix.layers, header, prefix.head)


@contextlib.contextmanager
def _checking(run: Path) -> Iterator[None]:
    """Turn what is wrong with a prefix into the job's failure; what the disk does not let be read stays as it is."""
    try:
        yield
    except CheckpointError as error:
        if is_unread(error):
            raise
        message = f"the trained prefix cannot be served: {error.message.replace(f'{run}/', '')}"
        raise JobFailedError("invalid_prefix", message) from error


def _check(path: Path, name: str, validator: PrefixValidator) -> None:
    """Check a file as an upload is checked."""
    if read_outline(path).num_parameters * validator.backbone.dtype.itemsize > validator.max_bytes:
        raise JobPausedError(f"the new model is larger than the {validator.max_bytes:,} bytes that servers take")
    validator.read_header(path)
    validator.load(path, name)


def _move(job: Job, names: list[str], made: Path, prefixes: Path) -> None:
    """Give files their names, in this order, the result's last; a checkpoint whose name another file has is left out.

    A checkpoint of the same owner's that stayed without its result is replaced.
    """
    if not _is_free(path_of(prefixes, job.name), job):
        raise JobPausedError(f"another model is served as {job.name!r} now")
    for name in names:
        path = path_of(prefixes, name)
        origin = _origin(path)
        is_left_over = origin is not None and origin.owner == job.owner and origin.step is not None
        if is_left_over or _is_free(path, job):
            os.replace(path_of(made, name), path)


def _is_free(path: Path, job: Job) -> bool:
    return not path.exists() or published_by(path) == job.id


def metrics_csv(events: Iterable[Event]) -> str:
    """The figures of a run's steps as CSV; losses are in nats per token, `seconds` are those of the step."""
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "step":
            figures = {"train_loss": event["loss_per_token"], "learning_rate": event["lr"], "seconds": event["seconds"]}
            rows[event["step"]] = {"step": event["step"], **figures}
        elif event["event"] == "evaluation" and "loss" in event:
            rows.setdefault(event["step"], {"step": event["step"]})["valid_loss"] = event["loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return text.getvalue()


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
