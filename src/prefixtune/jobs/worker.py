"""A worker: one process that trains the jobs of a queue one after the other, one process per device.

It may be killed at any moment. Its name is its executor's in DBOS: started again under the same name, it goes on with
its jobs. It holds a lock of that name, which the system lets go however it ends; whoever finds such a lock free queues
the jobs of that worker again. Asked to end, it saves, and gives its job back within seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefixtune.errors import PrefixError
from prefixtune.jobs.config import WorkerConfig, jobs_folder
from prefixtune.jobs.files import FileStore, UnknownFileError, result_file_id
from prefixtune.jobs.folder import DataFolder, is_job_id
from prefixtune.jobs.job import ENDED, Job, JobFailedError
from prefixtune.jobs.queue import (
    APPLICATION,
    PROTOCOL,
    WORKFLOW,
    JobQueue,
    QueueUnavailableError,
    migrate,
    queue_name,
)
from prefixtune.utils.locks import acquire_lock

_POLLING_SECONDS, _LOOK_SECONDS = 0.5, 0.2
_OFTEN_SECONDS, _SELDOM_SECONDS = 3.0, 600.0
_PATIENCE = 5.0
"""Seconds that a worker waits for the lock of the name that it was given: the one before may just be ending."""
_log = logging.getLogger("prefixtune.jobs")


def run_worker(config: WorkerConfig, stop: threading.Event) -> None:
    """Train jobs until `stop` is set, or until there was none for the configured time.

    Args:
        config: Of the worker.
        stop: Ends the work; states are saved before.

    Raises:
        PrefixError: The backbone cannot be loaded, the data folder cannot be used, another worker has the name, or the
            database cannot be reached at the start: whoever starts the worker starts it again.
    """
    # These load torch, which takes a while.
    from prefixtune.backbone.identity import backbone_identity
    from prefixtune.jobs.trainer import Trainer

    data = DataFolder(jobs_folder(config.data_folder, config.prefixes))
    _make_folders(data)
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
        stack.callback(lambda: _Chore(0.0, lambda: jobs.give_back(name, identity)).do_if_due())
        stack.enter_context(launch(url, name, identity, trainer.run))
        _note("worker_ready", worker_name=name, process=os.getpid(), backbone=identity)
        chores = (
            _Chore(_OFTEN_SECONDS, lambda: take_over(jobs, data.workers, name, identity)),
            _Chore(_OFTEN_SECONDS, lambda: clear_ended(data, jobs, prefixes)),
            _Chore(_SELDOM_SECONDS, lambda: forget_oldest(data, jobs, config.keep_jobs)),
        )
        while not stop.wait(_LOOK_SECONDS):
            for chore in chores:
                chore.do_if_due()
            is_idle = not trainer.is_busy and time.monotonic() - trainer.idle_since >= config.idle_seconds
            if config.idle_seconds and is_idle:
                stop.set()
        _note("worker_stopping", worker_name=name)
        while trainer.is_busy:
            time.sleep(_LOOK_SECONDS)
        if trainer.error is not None:
            raise trainer.error


def _make_folders(data: DataFolder) -> None:
    try:
        data.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        data.workers.mkdir(exist_ok=True)
    except OSError as error:
        raise PrefixError(
            f"the data folder {str(data.root)!r} cannot be made: {error.strerror or error}.",
            hint="choose another --data-folder.",
        ) from error


def _load(config: WorkerConfig) -> Any:
    from prefixtune.backbone.identity import public_name
    from prefixtune.backbone.load import load_backbone

    # Leaves the processor to others, and takes no more threads than wanted.
    if config.nice and hasattr(os, "nice"):
        os.nice(config.nice)
    if config.threads:
        import torch

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
    from dbos import DBOS, DBOSPortableJSONSerializer, PortableWorkflowError

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

    def step(step_name: str, work: Callable[[], Any]) -> Any:
        def recorded() -> Any:
            try:
                return work()
            except JobFailedError as failed:
                error = failed.error
                data = error.model_dump(mode="json")
                raise PortableWorkflowError(error.message, "JobFailedError", error.code, data) from None

        return DBOS.run_step({"name": step_name}, recorded)

    # A job that kills its worker again and again is noticed by the steps that it takes between, not by a count.
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def train(stored: dict[str, Any]) -> dict[str, Any]:
        return run(Job.model_validate(stored), step)

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
    names = [wanted] if wanted else [f"{machine}-{number}" for number in range(1, 100)]
    for name in names:
        try:
            lock = acquire_lock(locks / f"{name}.lock", _PATIENCE if wanted else 0.0)
        except OSError as error:
            raise PrefixError(
                f"the folder of workers {str(locks)!r} cannot be used: {error.strerror or error}.",
                hint="check its permissions, and that its file system has locks.",
            ) from error
        if lock is not None:
            try:
                yield name
            finally:
                lock.release()
            return
    raise PrefixError(f"another worker is called {names[-1]!r}.", hint="give each worker a --name of its own.")


def take_over(jobs: JobQueue, locks: Path, name: str, backbone: str) -> None:
    """Queue the jobs of dead workers again."""
    for other in jobs.workers(backbone) - {name}:
        if lock := acquire_lock(locks / f"{other}.lock", 0.0):
            try:
                for job_id in jobs.give_back(other, backbone):
                    _note("job_taken_over", job=job_id, worker_name=other)
            finally:
                lock.release()


# --- chores -----------------------------------------------------------------------------------------------------------


class _Chore:
    """Something that is done from time to time, the first time at once."""

    def __init__(self, seconds: float, do: Callable[[], object]) -> None:
        self._seconds, self._do, self._due = seconds, do, 0.0

    def do_if_due(self) -> None:
        """Do it, if its time has come; a failure hinders nobody else."""
        if time.monotonic() < self._due:
            return
        try:
            self._do()
        except QueueUnavailableError:
            # Whoever trains has said so.
            pass
        except (PrefixError, OSError) as error:
            _note("chore_failed", logging.WARNING, reason=str(error))
        self._due = time.monotonic() + self._seconds


def clear_ended(data: DataFolder, jobs: JobQueue, prefixes: Path) -> None:
    """Remove what jobs that have ended need no more, and what one that did not succeed has published."""
    from prefixtune.jobs.checkpoints import remove_checkpoints
    from prefixtune.jobs.publish import take_back
    from prefixtune.prefix.folder import ENDING, remove_abandoned_copies

    remove_abandoned_copies(prefixes)
    names = os.listdir(data.jobs) if data.jobs.is_dir() else []
    # Whoever has no inputs is not looked at again.
    with_inputs = [name for name in names if is_job_id(name) and data.job(name).inputs.exists()]
    for job_id, standing in jobs.standings(with_inputs).items():
        if standing.status not in ENDED:
            continue
        folder = data.job(job_id)
        with folder.hold() as held:
            if not held:
                continue
            if standing.status != "succeeded":
                for name in take_back(jobs.get(job_id).job, prefixes):
                    _note("result_removed", job=job_id, model=name)
                remove_checkpoints(folder)
            # States, what a teacher said, and the prefix, which is published.
            for path in folder.run.glob(f"*{ENDING}"):
                path.unlink(missing_ok=True)
            shutil.rmtree(folder.inputs)


def forget_oldest(data: DataFolder, jobs: JobQueue, keep: int) -> None:
    """Delete the oldest jobs of owners with too many that have ended, with their metrics; models stay."""
    files, ended = FileStore(data), Counter[str]()
    # All are read before one is deleted, which moves the others.
    for state in list(jobs.iterate()):
        job = state.job
        ended[job.owner] += state.status in ENDED
        if state.status in ENDED and ended[job.owner] > keep:
            # The job itself comes last: after a kill in between it is deleted again.
            shutil.rmtree(data.job(job.id).root, ignore_errors=True)
            with contextlib.suppress(UnknownFileError, OSError):
                files.delete(job.owner, result_file_id(job.id))
            jobs.delete(job.id)
            _note("job_deleted", job=job.id)


def _note(event: str, level: int = logging.INFO, **fields: Any) -> None:
    _log.log(level, event, extra={"fields": fields})
