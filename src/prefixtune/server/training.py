"""The server's side of training: uploaded files, the queue of jobs, and who may see what.

Nothing is made, opened or imported before the first request that needs it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from prefixtune.backbone.identity import backbone_identity
from prefixtune.errors import PrefixError
from prefixtune.jobs.checkpoints import remove_checkpoints
from prefixtune.jobs.config import jobs_folder
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder, is_job_id
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError, migrate
from prefixtune.prefix.header import JobOrigin
from prefixtune.server.auth import Caller
from prefixtune.server.limits import Gate
from prefixtune.server.logs import log
from prefixtune.server.responses import unavailable
from prefixtune.server.settings import ServeConfig

__all__ = ["Training"]


_THREADS = 4
_SECONDS = 60.0
"""Longest wait for the database; it gives up a lock after 30 seconds itself."""
_MOST_UPLOADS = 8

T = TypeVar("T")


class Training:
    """What endpoints for files and jobs work with.

    Args:
        config: The server's configuration.
        is_open: Whether no key is configured: everybody on this machine then sees everything.

    Attributes:
        folder: Files and jobs.
        database_url: Of the queue.
        files: The uploaded files.
        backbone: Whose workers train this server's jobs; see `backbone.identity`.
        wake: Called when there is a new job.
        uploads: Files that come in at once.
        adding: Held while a job is looked at and added.
    """

    def __init__(self, config: ServeConfig, *, is_open: bool) -> None:
        self.config, self.is_open = config, is_open
        self.folder = DataFolder(jobs_folder(config.data_folder, config.prefixes))
        self.database_url = config.database_url or f"sqlite:///{self.folder.database}"
        self.files, self.backbone = FileStore(self.folder), backbone_identity(config.backbone)
        self.uploads = Gate(_MOST_UPLOADS, shared=len(config.keys) > 1)
        self.wake: Callable[[], None] = _nobody_waits
        self.adding = threading.Lock()
        self._queue: JobQueue | None = None
        self._opening = threading.Lock()
        # Of its own: where the database is locked, only requests for training wait.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefixtune-jobs")

    @property
    def prefixes(self) -> Path:
        """The folder that results are served from."""
        return Path(self.config.prefixes).absolute()

    @property
    def is_used(self) -> bool:
        """Whether the queue has been opened."""
        return self._queue is not None

    def sees_all(self, caller: Caller) -> bool:
        """Whether somebody sees the files, jobs and results of all owners."""
        return self.is_open or caller.rules.admin

    def whose(self, caller: Caller) -> str | None:
        """Whose files and jobs somebody sees; None: everybody's."""
        return None if self.sees_all(caller) else caller.name

    def may_see(self, owner: str, caller: Caller) -> bool:
        """Whether somebody may see and change what belongs to an owner."""
        return owner == caller.name or self.sees_all(caller)

    async def ask(self, work: Callable[[JobQueue], T], *, changes: bool = False) -> T:
        """Do something with the queue, in a thread.

        What was begun is done, even if the client disconnects or the time is over.

        Args:
            work: Called with the queue.
            changes: Whether doing it twice is not the same as doing it once: clients are told not to try again by
                themselves.

        Raises:
            ApiError: The database is away or locked, or the data folder cannot be used.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(self._open_queue()))
        # Nobody may wait for it any more, and asyncio would complain.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(_SECONDS):
                return await asyncio.shield(future)
        except (TimeoutError, QueueUnavailableError) as error:
            log("queue_unavailable", level=logging.WARNING, reason=str(error) or "no answer in time")
            message = "the database of jobs cannot be reached now; try again later."
            raise unavailable(message, "queue_unavailable", retry_after=0 if changes else 5) from None

    def _open_queue(self) -> JobQueue:
        """The queue; a failure is tried again by the next request.

        Raises:
            QueueUnavailableError: The database cannot be reached.
            ApiError: The data folder cannot be used.
        """
        with self._opening:
            if self._queue is None:
                try:
                    self._queue = self._connect()
                except QueueUnavailableError:
                    raise
                except (PrefixError, OSError) as error:
                    log("training_unavailable", level=logging.ERROR, reason=str(error))
                    message = "the data folder cannot be used; the server's log has the reason."
                    raise unavailable(message, "training_unavailable") from None
            return self._queue

    def _connect(self) -> JobQueue:
        # What is uploaded is nobody else's business.
        self.folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        migrate(self.database_url)
        return JobQueue(self.database_url)

    def remove_checkpoints(self, origin: JobOrigin | None) -> None:
        """Remove a job's own copies of its checkpoints, once its result is gone.

        Args:
            origin: Of the prefix that is gone, whatever it was.
        """
        if origin is not None and origin.step is None and is_job_id(origin.id):
            remove_checkpoints(self.folder.job(origin.id))

    def has_jobs(self) -> bool:
        """Whether jobs of this server's backbone wait or run; blocks.

        A database in the data folder is not made for that.

        Raises:
            QueueUnavailableError: The database cannot be reached.
            ApiError: The data folder cannot be used.
        """
        if not self.config.database_url and not self.folder.database.exists():
            return False
        return self._open_queue().has_work(self.backbone)

    def close(self) -> None:
        """Close the queue."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()


def _nobody_waits() -> None:
    """Workers look for jobs themselves."""
