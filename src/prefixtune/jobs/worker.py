"""A worker: one process that trains the jobs of a queue, one per device.

It may be killed at any moment. Asked to end, it saves and ends within seconds; other workers, or the next start, take
its jobs over.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.config import WorkerConfig
from prefixtune.jobs.database import claim_database, claim_folder
from prefixtune.jobs.executor import ClaimLostError, Executor, JobPausedError
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder, is_job_id
from prefixtune.jobs.inputs import remove_job_folder
from prefixtune.jobs.job import Job, JobResult
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, migrate
from prefixtune.jobs.statuses import StatusWatch
from prefixtune.prefix.folder import Signature

__all__ = ["run_worker"]


_DATABASE_SECONDS = 60.0
"""How long a database that is not there yet is waited for, such as one that starts at the same time."""
_RETRY_SECONDS = 1.0
_TAKE_OVER_SECONDS, _TIDY_SECONDS, _CLEAR_SECONDS, _SWEEP_SECONDS = 3.0, 5.0, 15.0, 600.0
_ABANDONED_SECONDS = 3600.0
"""A job's folder that was not queued for this long was left by a kill."""
_OOM_SCORE = Path("/proc/self/oom_score_adj")
"""Linux ends the process with the highest score first: its share of the memory in thousandths, plus this."""
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**18
"""Of malloc.h; bytes."""
_PAGE = 200
_log = logging.getLogger("prefixtune.jobs")


def run_worker(config: WorkerConfig, stop: threading.Event) -> None:
    """Train jobs until `stop` is set, or until there was none for the configured time.

    Afterwards threads of the library of jobs still wait for the jobs that were left: the process is to end without
    them.

    Args:
        config: Of the worker.
        stop: Ends the work; states are saved before.

    Raises:
        ConfigError: The data folder belongs to another database, or the database to another data folder.
        PrefixError: The backbone cannot be loaded, the data folder cannot be written, or the database cannot be
            reached at the start.
    """
    from prefixtune.backbone.load import check_loadable

    check_loadable(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    data = DataFolder(Path(config.data_folder).absolute())
    url = config.database_url or data.database_url
    _lower_priority(config)
    _make_folders(data)
    claim_folder(data, url)
    with contextlib.ExitStack() as stack:
        jobs = _open_queue(url, stop)
        if jobs is None:
            return
        stack.callback(jobs.close)
        claim_database(data, jobs)
        _work(config, data, url, jobs, stop, stack)


def _work(
    config: WorkerConfig, data: DataFolder, url: str, jobs: JobQueue, stop: threading.Event, stack: contextlib.ExitStack
) -> None:
    # These load torch, which takes a while: wrong options are reported before.
    from prefixtune.backbone.identity import backbone_identity
    from prefixtune.jobs.publish import publish, tidy, unpublish
    from prefixtune.jobs.retention import clear_ended, forget_oldest
    from prefixtune.jobs.trainer import Trainer

    prefixes, files = Path(config.prefixes).absolute(), FileStore(data)
    watch = StatusWatch(jobs.standings, _log_database)
    trainer = Trainer(
        data,
        load=lambda: _load(config),
        publish=lambda job, run, backbone: publish(
            job, run, backbone, prefixes, files, max_bytes=config.cache_mib * 2**20
        ),
        unpublish=lambda job: unpublish(job, prefixes),
        statuses=watch,
        capacity=config.capacity,
    )
    identity = backbone_identity(config.backbone)
    executor = Executor(
        url,
        data.workers,
        backbone=identity,
        # Where the backbone turns out to train one job at a time, the other claimed ones wait here: rows that cannot be
        # packed are only known once it is loaded, which is when the first job comes.
        capacity=config.capacity,
        run=lambda job, token: _pausing(trainer.submit, jobs, job, token),
        name=config.name,
    )
    executor.start()
    stack.callback(executor.stop)
    watch.start()
    stack.callback(watch.stop)
    _log_event("worker_ready", worker_name=executor.name, process=os.getpid(), backbone=identity)
    settled: dict[str, Signature] = {}
    chores: list[tuple[float, Callable[[], object]]] = [
        (_TAKE_OVER_SECONDS, lambda: _take_over(executor, jobs)),
        (_TIDY_SECONDS, lambda: _tidy(lambda: tidy(jobs, prefixes, settled))),
        (_CLEAR_SECONDS, lambda: clear_ended(data, jobs)),
        (_SWEEP_SECONDS, lambda: sweep(data, jobs)),
        (_SWEEP_SECONDS, lambda: _forget(forget_oldest(data, jobs, files, config.keep_jobs))),
    ]
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
    """Leave the processor to others, take no more threads than wanted, and be the first that lack of memory ends."""
    if config.nice and hasattr(os, "nice"):
        os.nice(config.nice)
    # Its jobs go on from their saved states; what a server loses is lost.
    with contextlib.suppress(OSError):
        _OOM_SCORE.write_text("500")
    _save_memory()
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)


def _save_memory() -> None:
    """Give memory back between passes, and keep little of what is of use to one pass only."""
    # The C library's own limit grows with what is freed, and blocks below it leave holes between those that stay.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    # oneDNN keeps 1,024 compiled products otherwise, though nearly each pass has another number of tokens.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def _make_folders(data: DataFolder) -> None:
    try:
        data.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PrefixError(
            f"the data folder {str(data.root)!r} cannot be made: {error.strerror or error}.",
            hint="choose another --data-folder.",
        ) from error


def _open_queue(url: str, stop: threading.Event) -> JobQueue | None:
    """The queue, once its database is there; None: the worker is to end before.

    Raises:
        QueueUnavailableError: It was not there for too long.
    """
    deadline = time.monotonic() + _DATABASE_SECONDS
    is_away = False
    while not stop.is_set():
        try:
            migrate(url)
            return JobQueue(url)
        except QueueUnavailableError as error:
            if time.monotonic() >= deadline:
                raise
            if not is_away:
                _log_database(error.message)
            is_away = True
        stop.wait(_RETRY_SECONDS)
    return None


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


def _run_chores(chores: list[tuple[float, Callable[[], object]]], ended: threading.Event) -> None:
    """Do each of the chores at its interval, the first time at once."""
    due = [0.0] * len(chores)
    failing: set[int] = set()
    while not ended.wait(0.2):
        for index, (seconds, chore) in enumerate(chores):
            if time.monotonic() < due[index]:
                continue
            try:
                chore()
                failing.discard(index)
            except Exception as error:
                # Tried again; said once.
                if index not in failing and not ended.is_set():
                    known = isinstance(error, PrefixError)
                    _log_event("chore_failed", logging.WARNING, None if known else error, reason=str(error))
                failing.add(index)
            due[index] = time.monotonic() + seconds


def _take_over(executor: Executor, jobs: JobQueue) -> None:
    for worker in executor.take_over(jobs):
        _log_event("worker_taken_over", worker_name=worker)
    for job_id in executor.give_back_lost(jobs):
        _log_event("claim_given_back", logging.WARNING, job=job_id)


def _tidy(tidy: Callable[[], list[str]]) -> None:
    for name in tidy():
        _log_event("result_removed", model=name)


def _forget(job_ids: list[str]) -> None:
    if job_ids:
        _log_event("jobs_deleted", count=len(job_ids), newest=job_ids[0], oldest=job_ids[-1])


def sweep(data: DataFolder, jobs: JobQueue) -> list[str]:
    """Remove the folders of jobs that were never queued, as where a server was killed in between; returns their ids.

    Those that a worker has begun stay, whatever this database knows.

    Raises:
        QueueUnavailableError: The database cannot be reached.
    """
    removed: list[str] = []
    for job_ids in _pages(_old_folders(data)):
        for job_id in sorted(set(job_ids) - jobs.statuses(job_ids).keys()):
            remove_job_folder(data, job_id)
            _log_event("job_folder_removed", job=job_id)
            removed.append(job_id)
    return removed


def _old_folders(data: DataFolder) -> list[str]:
    """The ids of jobs whose folders have not changed for a while."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(data.jobs) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                is_old = is_job_id(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
                if is_old and not data.job(entry.name).events.exists():
                    found.append(entry.name)
    return found


def _pages(job_ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(job_ids), _PAGE):
        yield job_ids[start : start + _PAGE]


def _log_database(reason: str | None) -> None:
    if reason is None:
        _log_event("database_back")
    else:
        _log_event("database_away", logging.WARNING, reason=reason)


def _log_event(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    _log.log(level, event, extra={"fields": fields}, exc_info=error)
