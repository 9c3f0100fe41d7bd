"""A worker: one process that trains the jobs of a queue, one per device.

It may be killed at any moment. Asked to end, it saves and ends within seconds; other workers, or the next start, take
its jobs over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.config import WorkerConfig
from prefixtune.jobs.executor import ClaimLostError, Executor, JobPausedError
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import Job, JobResult
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, migrate
from prefixtune.prefix.folder import Signature

__all__ = ["run_worker"]


_RETRY_SECONDS = 1.0
_OFTEN_SECONDS, _SELDOM_SECONDS = 3.0, 600.0
_log = logging.getLogger("prefixtune.jobs")


def run_worker(config: WorkerConfig, stop: threading.Event) -> None:
    """Train jobs until `stop` is set, or until there was none for the configured time.

    Afterwards threads of the library of jobs still wait for the jobs that were left: the process is to end without
    them.

    Args:
        config: Of the worker.
        stop: Ends the work; states are saved before.

    Raises:
        PrefixError: The backbone cannot be loaded, the data folder cannot be written, or the database cannot be
            reached at the start: whoever starts the worker starts it again.
    """
    from prefixtune.backbone.devices import choose_device, choose_dtype
    from prefixtune.backbone.load import resolve

    choose_dtype(config.dtype, choose_device(config.device))
    resolve(config.backbone, config.quantize)
    data = DataFolder(Path(config.data_folder).absolute())
    url = config.database_url or data.database_url
    _lower_priority(config)
    _make_folders(data)
    migrate(url)
    with contextlib.ExitStack() as stack:
        jobs = JobQueue(url)
        stack.callback(jobs.close)
        _work(config, data, url, jobs, stop, stack)


def _work(
    config: WorkerConfig, data: DataFolder, url: str, jobs: JobQueue, stop: threading.Event, stack: contextlib.ExitStack
) -> None:
    # These load torch, which takes a while: wrong options are reported before.
    from prefixtune.backbone.identity import backbone_identity
    from prefixtune.jobs.publish import publish, tidy
    from prefixtune.jobs.retention import clear_ended, forget_oldest
    from prefixtune.jobs.trainer import Trainer

    prefixes, files = Path(config.prefixes).absolute(), FileStore(data)
    trainer = Trainer(
        data,
        load=lambda: _load(config),
        publish=lambda job, run, backbone: publish(
            job, run, backbone, prefixes, files, max_bytes=config.cache_mib * 2**20
        ),
        standing=lambda job_id: jobs.standings([job_id]).get(job_id),
    )
    identity = backbone_identity(config.backbone)
    executor = Executor(
        url,
        data.workers,
        backbone=identity,
        run=lambda job, token: _pausing(trainer.submit, jobs, job, token),
        name=config.name,
    )
    executor.start()
    stack.callback(executor.stop)
    _log_event("worker_ready", worker_name=executor.name, process=os.getpid(), backbone=identity)
    settled: dict[str, Signature] = {}

    def take_over() -> None:
        for worker in executor.take_over(jobs):
            _log_event("worker_taken_over", worker_name=worker)

    def take_back() -> None:
        for name in tidy(jobs, prefixes, settled):
            _log_event("result_removed", model=name)

    def forget() -> None:
        for job_id in forget_oldest(data, jobs, files, config.keep_jobs):
            _log_event("job_deleted", job=job_id)

    # Apart, so that one that fails each time hinders no other.
    often = (take_over, take_back, lambda: clear_ended(data, jobs))
    chores = [*((_OFTEN_SECONDS, chore) for chore in often), (_SELDOM_SECONDS, forget)]
    ended = threading.Event()
    stack.callback(ended.set)
    threading.Thread(target=_run_chores, args=(chores, ended), name="prefixtune-chores", daemon=True).start()
    trainer.work(stop, config.idle_seconds)
    _log_event("worker_stopping", worker_name=executor.name)


def _pausing(run: Callable[[Job, str], JobResult], jobs: JobQueue, job: Job, token: str) -> JobResult:
    """Run a job; where it cannot go on now, pause it as its owner would.

    Raises:
        JobFailedError: It failed.
        ClaimLostError: It was stopped.
    """
    try:
        return run(job, token)
    except JobPausedError:
        while True:
            with contextlib.suppress(QueueUnavailableError):
                # A job that was deleted needs no pause.
                with contextlib.suppress(RequestError):
                    jobs.pause(job.id, token)
                raise ClaimLostError from None
            time.sleep(_RETRY_SECONDS)


def _lower_priority(config: WorkerConfig) -> None:
    """Leave the processor to others, and take no more threads than wanted."""
    if config.nice and hasattr(os, "nice"):
        os.nice(config.nice)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)


def _make_folders(data: DataFolder) -> None:
    try:
        data.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PrefixError(
            f"the data folder {str(data.root)!r} cannot be made: {error.strerror or error}.",
            hint="choose another --data-folder.",
        ) from error


def _load(config: WorkerConfig) -> Any:
    from prefixtune.backbone.identity import public_name
    from prefixtune.backbone.load import load_backbone

    started = time.monotonic()
    backbone = load_backbone(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    # Results, states and errors hold this name.
    backbone = dataclasses.replace(backbone, name=public_name(config.backbone, config.backbone_id))
    _log_event("backbone_loaded", backbone=backbone.name, seconds=round(time.monotonic() - started, 1))
    return backbone


# --- chores -----------------------------------------------------------------------------------------------------------


def _run_chores(chores: Sequence[tuple[float, Callable[[], object]]], ended: threading.Event) -> None:
    """Do each of the chores at its interval, the first time at once."""
    due = [0.0] * len(chores)
    while not ended.wait(0.2):
        for index, (seconds, chore) in enumerate(chores):
            if time.monotonic() < due[index]:
                continue
            try:
                chore()
            except QueueUnavailableError:
                # Whoever trains has said so.
                pass
            except Exception as error:
                known = isinstance(error, PrefixError)
                _log_event("chore_failed", logging.WARNING, None if known else error, reason=str(error))
            due[index] = time.monotonic() + seconds


def _log_event(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    _log.log(level, event, extra={"fields": fields}, exc_info=error)
