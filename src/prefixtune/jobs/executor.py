"""A worker's side of the queue: claim jobs, run them, and take over those of workers that died.

A worker holds a lock as long as it lives, which the system lets go however it ends. So whoever can take the lock of
another worker knows that it is dead, whatever the clocks say, and queues its jobs again. The database lets only the
claim that is the last one end a job.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.errors import PrefixError
from prefixtune.jobs.job import Job, JobError, JobResult
from prefixtune.jobs.queue import APPLICATION, PROTOCOL, WORKFLOW, JobQueue, queue_name
from prefixtune.utils.locks import acquire_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ClaimLostError", "Executor", "JobFailedError", "JobPausedError"]


_POLLING_SECONDS = 0.5
_PATIENCE = 5.0
"""Seconds that a worker waits for its own lock."""


class JobFailedError(Exception):
    """A job ends as failed.

    Args:
        error: What its owner is told.
    """

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class JobPausedError(Exception):
    """A job cannot go on now, by no fault of its own: it is to be paused, so that what it has trained is kept.

    The message is the reason, as its owner may read it: a part of a sentence.
    """


class ClaimLostError(Exception):
    """A claim holds no more: its job was paused, cancelled or deleted, or another claim has it."""


class _ThreadEnd(BaseException):
    """Ends the thread of a lost claim.

    After an `Exception` the library would keep the thread, and ask where the job stands, until another claim has ended
    the job.
    """


class Executor:
    """Claims jobs for one worker. One per process: DBOS is one per process.

    Args:
        database_url: Of the queue; its tables exist.
        locks: The folder of the workers' locks.
        backbone: Only its jobs are claimed; see `backbone.identity`.
        run: Runs a job to its end in a thread of its own and returns what it left; called with the job and the token of
            the claim, and perhaps again for a job that another worker, or an earlier call, has begun. Raises
            `JobFailedError` where the job fails, and `ClaimLostError` once another token, or none, holds.
        name: Part of the worker's name: letters, digits and hyphens.

    Raises:
        PrefixError: The folder of locks cannot be written.
    """

    def __init__(
        self,
        database_url: str,
        locks: Path,
        *,
        backbone: str,
        run: Callable[[Job, str], JobResult],
        name: str = "",
    ) -> None:
        self.name = "-".join(filter(None, ("worker", name, secrets.token_hex(8))))
        self._database_url, self._locks, self._run = database_url, locks, run
        self._queue_name = queue_name(backbone)
        self._lock: BaseFileLock | None = None

    def start(self) -> None:
        """Hold this worker's lock, and claim jobs from now on."""
        from dbos import DBOS, DBOSPortableJSONSerializer, PortableWorkflowError
        from dbos._context import current_owner_xid

        self._lock = self._hold()
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self._database_url,
                "executor_id": self.name,
                "application_version": PROTOCOL,
                # The default is pickle, which runs code.
                "serializer": DBOSPortableJSONSerializer(),
                "log_level": "ERROR",
                "enable_otlp": False,
            }
        )

        # A job that kills its worker again and again is noticed by the steps that it takes between, not by a count.
        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        def train(stored: dict[str, Any]) -> dict[str, Any]:
            job = Job.model_validate(stored)
            token = current_owner_xid(job.id) or ""
            try:
                return self._run(job, token).model_dump(mode="json")
            except ClaimLostError:
                raise _ThreadEnd from None
            except JobFailedError as failed:
                raise PortableWorkflowError(
                    failed.error.message, "JobFailedError", failed.error.code, failed.error.model_dump(mode="json")
                ) from None

        # The worker's log tells of jobs that fail; the library would add its own traceback.
        logging.getLogger("dbos").addFilter(lambda record: "background workflow" not in str(record.msg))
        DBOS.listen_queues([self._queue_name])
        DBOS.launch()
        DBOS.register_queue(self._queue_name, worker_concurrency=1, polling_interval_sec=_POLLING_SECONDS)

    def _hold(self) -> BaseFileLock:
        """This worker's lock."""
        reason = "the lock is held by another process"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            # Another worker may just try it: it finds the file before it is locked.
            if lock := acquire_lock(self._locks / f"{self.name}.lock", _PATIENCE):
                return lock
        except OSError as error:
            reason = error.strerror or str(error)
        raise PrefixError(
            f"the folder of workers {str(self._locks)!r} cannot be used: {reason}.",
            hint="check its permissions, and that its file system has locks.",
        )

    def take_over(self, queue: JobQueue) -> list[str]:
        """Queue the jobs of dead workers again, and remove their locks; returns the names of these workers."""
        from dbos import DBOS

        dead = []
        # Workers that had no job when they died left only a lock.
        known = {path.stem for path in self._locks.glob("worker-*.lock")}
        for worker in sorted((known | set(queue.workers())) - {self.name}):
            with _taken(self._locks / f"{worker}.lock") as is_dead:
                if is_dead:
                    # Changes only jobs that still run as this worker's, in one statement each.
                    DBOS._recover_pending_workflows([worker])
                    dead.append(worker)
        return dead

    def stop(self) -> None:
        """Claim no more jobs, and let the lock go: others then take over what this worker has not ended."""
        from dbos import DBOS

        DBOS.destroy(workflow_completion_timeout_sec=0)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self._locks / f"{self.name}.lock").unlink()
            self._lock.release()


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Take a worker's lock while the block runs, if nobody holds it; removed afterwards."""
    lock = None
    with contextlib.suppress(OSError):
        lock = acquire_lock(path, 0.0)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()
