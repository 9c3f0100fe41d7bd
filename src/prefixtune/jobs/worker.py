"""A worker: one process that trains the jobs of a queue one after the other, one process per device.

It may be killed at any moment. Its name is its executor's in DBOS: started again under the same name, it goes on with
its jobs. It holds a lock of that name, which the system lets go however it ends; whoever finds such a lock free queues
the jobs of that worker again. Asked to end, it saves, and gives its job back within seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import re
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
from prefixtune.jobs.publish import remove_checkpoints, take_back
from prefixtune.jobs.queue import APPLICATION, PROTOCOL, WORKFLOW, JobQueue, migrate, queue_name
from prefixtune.jobs.trainer import Trainer, note
from prefixtune.prefix.folder import ENDING, remove_abandoned_copies
from prefixtune.utils.files import reporting_write_errors
from prefixtune.utils.locks import acquire_lock

_POLLING_SECONDS, _LOOK_SECONDS = 0.5, 0.2
_CHORE_SECONDS = 3.0
_PATIENCE = 5.0
"""Seconds that a worker waits for the lock of the name that it was given: the one before may just be ending."""


def run_worker(config: WorkerConfig, stop: threading.Event) -> None:
    """Train jobs until `stop` is set, or until there was none for the configured time.

    Args:
        config: Of the worker.
        stop: Ends the work; states are saved before.

    Raises:
        PrefixError: The backbone cannot be loaded, the data folder cannot be used, another worker has the name, or the
            database cannot be reached at the start: whoever starts the worker starts it again.
    """
    data = DataFolder(jobs_folder(config.data_folder, config.prefixes))
    with reporting_write_errors(data.root):
        data.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        data.workers.mkdir(exist_ok=True)
    url = config.database_url or f"sqlite:///{data.database}"
    backbone, identity = _load(config), backbone_identity(config.backbone)
    prefixes = Path(config.prefixes).absolute()
    migrate(url)
    with contextlib.ExitStack() as stack:
        jobs = JobQueue(url)
        stack.callback(jobs.close)
        name = stack.enter_context(hold_name(data.workers, config.name))
        max_bytes = config.cache_mib * 2**20
        trainer = Trainer(data, jobs, backbone, prefixes, worker=name, stop=stop, max_bytes=max_bytes)
        # Under its name, the next worker takes them up all the same.
        stack.callback(_try, lambda: jobs.give_back(name, identity))
        stack.enter_context(launch(url, name, identity, trainer.run))
        note("worker_ready", worker_name=name, process=os.getpid(), backbone=identity)
        due = 0.0
        while not stop.wait(_LOOK_SECONDS):
            if time.monotonic() >= due:
                _try(lambda: take_over(jobs, data.workers, name, identity))
                _try(lambda: clear_ended(data, jobs, prefixes))
                due = time.monotonic() + _CHORE_SECONDS
            idle = 0.0 if trainer.is_busy else time.monotonic() - trainer.idle_since
            if 0 < config.idle_seconds <= idle:
                stop.set()
        note("worker_stopping", worker_name=name)
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
    database_url: str, name: str, backbone: str, run: Callable[[Job, Callable[..., Any]], dict[str, Any]]
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
            "enable_otlp": False,
        }
    )

    # A job that kills its worker again and again is noticed by the steps that it takes between, not by a count.
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def train(stored: dict[str, Any]) -> dict[str, Any]:
        return run(Job.model_validate(stored), lambda step, work: DBOS.run_step({"name": step}, work))

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


# --- names ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_name(locks: Path, wanted: str = "") -> Iterator[str]:
    """Hold a worker's name while the block runs; yields it.

    Args:
        locks: The folder of all workers' locks.
        wanted: The name; empty: this machine's, with the first number that no other worker has.

    Raises:
        PrefixError: Another worker has it, or the folder cannot be used.
    """
    machine = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "worker"
    for name in [wanted] if wanted else [f"{machine}-{number}" for number in range(1, 100)]:
        with reporting_write_errors(locks):
            lock = acquire_lock(locks / f"{name}.lock", _PATIENCE if wanted else 0.0)
        if lock is not None:
            try:
                yield name
            finally:
                lock.release()
            return
    raise PrefixError(f"another worker is called {name!r}.", hint="give each worker a --name of its own.")


def take_over(jobs: JobQueue, locks: Path, name: str, backbone: str) -> None:
    """Queue the jobs of dead workers again."""
    for other in jobs.workers(backbone) - {name}:
        if lock := acquire_lock(locks / f"{other}.lock", 0.0):
            try:
                for job_id in jobs.give_back(other, backbone):
                    note("job_taken_over", job=job_id, worker_name=other)
            finally:
                lock.release()


# --- chores -----------------------------------------------------------------------------------------------------------


def _try(chore: Callable[[], object]) -> None:
    """Do something that may fail, and is then done again another time."""
    try:
        chore()
    except (PrefixError, OSError) as error:
        note("chore_failed", logging.WARNING, reason=str(error))


def clear_ended(data: DataFolder, jobs: JobQueue, prefixes: Path) -> None:
    """Remove what jobs that have ended need no more, and what one that did not succeed has published."""
    remove_abandoned_copies(prefixes)
    # Whoever has no inputs is not looked at again.
    with_inputs = [path.parent.name for path in data.jobs.glob("ftjob-*/inputs")]
    for state in jobs.states(with_inputs).values():
        if state.status in ENDED:
            _try(functools.partial(_clear, data.job(state.job.id), state, prefixes))


def _clear(folder: JobFolder, state: JobState, prefixes: Path) -> None:
    with folder.hold() as held:
        if not held:
            return
        if state.status != "succeeded":
            for name in take_back(state.job, prefixes):
                note("result_removed", job=state.job.id, model=name)
            remove_checkpoints(folder)
        # States, what a teacher said, and the prefix, which is published.
        for path in folder.run.glob(f"*{ENDING}"):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder.inputs)
