"""The server's side of training: uploaded files, the queue of jobs, and who may see what.

Nothing is made, opened or imported before the first request that needs it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from fastapi.concurrency import run_in_threadpool

from prefixtune.backbone.identity import backbone_identity
from prefixtune.errors import PrefixError
from prefixtune.jobs.config import jobs_folder
from prefixtune.jobs.files import FileStore
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.server.auth import Caller, Gate
from prefixtune.server.logs import log
from prefixtune.server.responses import unavailable
from prefixtune.server.settings import ServeConfig

__all__ = ["Training"]


_AT_ONCE = 4
"""Requests that wait for the database; it gives up a lock after 30 seconds itself."""
_MOST_UPLOADS = 8

T = TypeVar("T")


class Training:
    """What endpoints for files and jobs work with.

    Args:
        config: The server's configuration.

    Attributes:
        is_open: Whether no key is configured: everybody on this machine then sees everything.
        folder: Files and jobs.
        database_url: Of the queue.
        files: The uploaded files.
        backbone: Whose workers train this server's jobs; see `backbone.identity`.
        wake: Called when there is a new job.
        uploads: Files that come in at once.
        adding: Held while a job is looked at and added.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.is_open = config, not config.keys
        self.folder = DataFolder(jobs_folder(config.data_folder, config.prefixes))
        self.database_url = config.database_url or self.folder.database_url
        self.files, self.backbone = FileStore(self.folder), backbone_identity(config.backbone)
        self.uploads = Gate(_MOST_UPLOADS, max(1, len(config.keys)))
        self.wake: Callable[[], None] = lambda: None
        self.adding = threading.Lock()
        self._queue: JobQueue | None = None
        self._opening = threading.Lock()
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def whose(self, caller: Caller) -> str | None:
        """Whose files and jobs somebody may see and change; None: everybody's."""
        return None if self.is_open or caller.rules.admin else caller.name

    async def ask(self, work: Callable[[JobQueue], T], *, changes: bool = False) -> T:
        """Do something with the queue, in a thread; what was begun is done, even if the client disconnects.

        Args:
            work: Called with the queue.
            changes: Whether doing it twice is not the same as doing it once: clients are told not to try again by
                themselves.

        Raises:
            ApiError: The database is away or locked, or the data folder cannot be used.
        """
        # Where the database is locked, only requests for training wait.
        async with self._turns:
            try:
                return await run_in_threadpool(lambda: work(self._open_queue()))
            except QueueUnavailableError as error:
                log("queue_unavailable", level=logging.WARNING, reason=str(error))
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
                    self.folder.make()
                except PrefixError as error:
                    log("training_unavailable", level=logging.ERROR, reason=str(error))
                    message = "the data folder cannot be used; the server's log has the reason."
                    raise unavailable(message, "training_unavailable") from None
                self._queue = JobQueue(self.database_url)
            return self._queue

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
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
