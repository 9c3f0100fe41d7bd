"""A worker: one process that trains the jobs of a queue one after the other, one process per device.

It may be killed at any moment. Whoever trains a job holds a lock in the job's folder, which the system lets go however
the worker ends: the others queue a job again whose lock they find free. The worker's name is its executor's in DBOS:
started again under the same name, it goes on with its jobs. Asked to end, it saves, and gives its job back in seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dbos import DBOS, DBOSPortableJSONSerializer

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import backbone_identity, public_name
from prefixtune.backbone.load import load_backbone
from prefixtune.errors import PrefixError
from prefixtune.jobs.config import WorkerConfig, jobs_folder
from prefixtune.jobs.folder import DataFolder, JobFolder
from prefixtune.jobs.job import ENDED, Job, JobState
from prefixtune.jobs.publish import take_back
from prefixtune.jobs.queue import APPLICATION, PROTOCOL, WORKFLOW, JobQueue, queue_name
from prefixtune.jobs.trainer import Trainer, note
from prefixtune.prefix.folder import ENDING
from prefixtune.utils.files import remove_abandoned
from prefixtune.utils.locks import check_locks, file_lock

_POLLING_SECONDS, _LOOK_SECONDS = 0.5, 0.2
_PATIENCE = 5.0
"""Seconds that a worker waits for the name that it was given: the one before may just be ending."""
_CHORE_SECONDS, _ORPHAN_SECONDS = 3.0, 86_400.0
"""Between two looks at what others left; and the age of a job's folder that is removed, as no such job was queued."""


def run_worker(config: WorkerConfig, stop: threading.Event) -> None:
    """Train jobs until `stop` is set, or until there was none for the configured time.

    Args:
        config: Of the worker.
        stop: Ends the work; states are saved before.

    Raises:
        PrefixError: The backbone cannot be loaded, the data folder cannot be used or has no locks, another worker has
            the name, or the database cannot be reached at the start: whoever starts the worker starts it again.
    """
    data = DataFolder(jobs_folder(config.data_folder, config.prefixes))
    data.make()
    check_locks(data.jobs)
    machine = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "worker"
    prefixes, name = Path(config.prefixes).absolute(), config.name or f"{machine}-{secrets.token_hex(3)}"
    lock = data.root / f".{name}.lock"
    with file_lock(lock, _PATIENCE) if config.name else contextlib.nullcontext(True) as is_alone:
        if not is_alone:
            raise PrefixError(f"another worker is called {name!r}.", hint="give each worker a --name of its own.")
        backbone, identity = _load(config), backbone_identity(config.backbone)
        url = config.database_url or data.database_url
        with contextlib.closing(JobQueue(url)) as jobs:
            trainer = Trainer(data, jobs, backbone, prefixes, worker=name, stop=stop, max_bytes=config.cache_mib << 20)
            with launch(url, name, identity, trainer.run):
                note("worker_ready", worker_name=name, process=os.getpid(), backbone=identity)
                _work(config, trainer, identity)
            _try(look_after, data, jobs, identity, prefixes)


def _work(config: WorkerConfig, trainer: Trainer, backbone: str) -> None:
    """Look after all jobs while this worker's are trained; returns when it is to end and has left its job."""
    due, busy_at = 0.0, time.monotonic()
    while not trainer.stop.wait(_LOOK_SECONDS):
        if time.monotonic() >= due:
            _try(look_after, trainer.data, trainer.jobs, backbone, trainer.prefixes, trainer.worker)
            due = time.monotonic() + _CHORE_SECONDS
        if trainer.is_busy:
            busy_at = time.monotonic()
        if 0 < config.idle_seconds <= time.monotonic() - busy_at:
            trainer.stop.set()
    note("worker_stopping", worker_name=trainer.worker)
    while trainer.is_busy:
        time.sleep(_LOOK_SECONDS)


def _load(config: WorkerConfig) -> Backbone:
    # Leaves the processor to others, and takes no more threads than wanted.
    if config.nice and hasattr(os, "nice"):
        os.nice(config.nice)
    if config.threads:
        torch.set_num_threads(config.threads)
    backbone = load_backbone(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    # Results, states and errors hold this name.
    return dataclasses.replace(backbone, name=public_name(config.backbone, config.backbone_id))


# --- DBOS -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launch(
    database_url: str, name: str, backbone: str, run: Callable[[Job, Callable[..., Any]], object]
) -> Iterator[None]:
    """Claim jobs for a worker while the block runs, those of an earlier one of its name first. One per process.

    Args:
        database_url: Of the queue; its tables exist.
        name: Of the worker.
        backbone: Only its jobs are claimed; see `backbone.identity`.
        run: As `Trainer.run`, called in a thread.
    """
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": database_url,
            "executor_id": name,
            "application_version": PROTOCOL,
            # The default is pickle, which runs code.
            "serializer": DBOSPortableJSONSerializer(),
            # The worker's log tells of jobs that fail; the library would add its own traceback.
            "log_level": "CRITICAL",
        }
    )

    # A job that kills its worker again and again is noticed by the steps that it takes between, not by a count.
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def train(stored: dict[str, Any]) -> None:
        run(Job.model_validate(stored), lambda step, work: DBOS.run_step({"name": step}, work))

    queue = queue_name(backbone)
    DBOS.listen_queues([queue])
    DBOS.launch()
    # Partitioned by owner: each time, one of the owners who wait is chosen by chance.
    DBOS.register_queue(
        queue,
        worker_concurrency=1,
        partition_worker_concurrency=1,
        polling_interval_sec=_POLLING_SECONDS,
        on_conflict="always_update",
    )
    try:
        yield
    finally:
        DBOS.destroy(workflow_completion_timeout_sec=0)


# --- chores -----------------------------------------------------------------------------------------------------------


def _try(chore: Callable[..., None], *arguments: Any) -> None:
    """Do something that may fail, and is then done again another time."""
    try:
        chore(*arguments)
    except (PrefixError, OSError) as error:
        note("chore_failed", logging.WARNING, reason=str(error))


def look_after(data: DataFolder, jobs: JobQueue, backbone: str, prefixes: Path, worker: str = "") -> None:
    """Queue the jobs again that nobody trains, as their worker has died or is just ending; and clear what has ended.

    Args:
        data: The folders of jobs; one that has no inputs is not looked at again.
        jobs: The queue.
        backbone: Whose jobs this worker's kind trains.
        prefixes: The folder that servers serve from.
        worker: One whose jobs are left to it.
    """
    for parent in (data.files, data.jobs, prefixes):
        remove_abandoned(parent)
    folders = {path.parent.name: data.job(path.parent.name) for path in data.jobs.glob("ftjob-*/inputs")}
    states = jobs.states(list(folders))
    for job_id, folder in folders.items():
        state = states.get(job_id)
        if state is None:
            # The database went away before the job was queued.
            if time.time() - folder.inputs.stat().st_mtime > _ORPHAN_SECONDS:
                shutil.rmtree(folder.root)
        elif state.status in ENDED:
            _try(_clear, folder, state, prefixes)
        elif state.status == "running" and state.worker != worker and state.job.backbone == backbone:
            with folder.hold() as is_free:
                # Its owner may have paused it since.
                if is_free and jobs.states([job_id]).get(job_id) == state:
                    jobs.resume(job_id)
                    note("job_taken_over", job=job_id, worker_name=state.worker)


def _clear(folder: JobFolder, state: JobState, prefixes: Path) -> None:
    """Remove what a job that has ended needs no more, and what one that did not succeed has published."""
    with folder.hold() as held:
        if held:
            for name in take_back(state.job, prefixes) if state.status != "succeeded" else ():
                note("result_removed", job=state.job.id, model=name)
            # States, what a teacher said, the prefix and checkpoints, which are published; locks that a kill left.
            for path in [*folder.run.rglob(f"*{ENDING}"), *folder.run.rglob(".*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.rmtree(folder.inputs)
