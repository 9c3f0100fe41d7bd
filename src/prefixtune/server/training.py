"""The server's side of training: uploaded files, the queue of jobs, who may see what, and a line for each change.

Nothing is made, opened or imported before the first request that needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefixtune.backbone.identity import backbone_identity
from prefixtune.errors import PrefixError
from prefixtune.jobs.checkpoints import remove_checkpoints
from prefixtune.jobs.database import claim_database, claim_folder
from prefixtune.jobs.folder import DataFolder, is_job_id
from prefixtune.jobs.queue import JobQueue, OutcomeUnknownError, QueueUnavailableError, migrate
from prefixtune.prefix.header import JobOrigin
from prefixtune.server.auth import Caller
from prefixtune.server.limits import SharedCapacity
from prefixtune.server.logs import log
from prefixtune.server.responses import ApiError, storage_error, unavailable
from prefixtune.server.settings import ServeConfig
from prefixtune.server.threads import FairThreads
from prefixtune.utils.files import append_line
from prefixtune.utils.locks import file_lock

if TYPE_CHECKING:
    from prefixtune.jobs.files import FileStore

__all__ = ["Training"]


_THREADS = 4
_MOST_WAITING = 32
"""Requests of one tenant that wait for the database or are answered by it."""
_SECONDS = 60.0
"""Longest wait for the database; it gives up a lock after 30 seconds itself."""
_ADDING_SECONDS = 20.0
"""Longest wait for others that add jobs of the same owner."""
_LONGEST_FIELD = 200
"""Of the file of changes."""
_MOST_UPLOADS, _MOST_STREAMS = 8, 64

T = TypeVar("T")


class Training:
    """What endpoints for files and jobs work with.

    Args:
        config: The server's configuration.
        is_open: Whether no key is configured: everybody on this machine then sees everything.

    Attributes:
        folder: Files and jobs.
        database_url: Of the queue.
        backbone: Whose workers train this server's jobs; see `backbone.identity`.
        streams: Streams of events that are open.
        wake: Called when there is a new job.
        uploads: Files that come in at once.
    """

    def __init__(self, config: ServeConfig, *, is_open: bool) -> None:
        self.config, self.is_open = config, is_open
        self.folder = DataFolder(Path(config.data_folder).absolute())
        self.database_url = config.database_url or self.folder.database_url
        self.backbone = backbone_identity(config.backbone)
        self.streams = SharedCapacity(_MOST_STREAMS)
        self.wake: Callable[[], None] = _nobody_waits
        self._queue: JobQueue | None = None
        self._opening = threading.Lock()
        # Of its own: where the database is locked, only requests for training wait.
        self._threads = FairThreads(_THREADS, "prefixtune-jobs")
        self._waiting: Counter[str] = Counter()
        self.uploads = SharedCapacity(_MOST_UPLOADS)
        # Also of its own: reading a large file takes minutes.
        self._readers = FairThreads(_MOST_UPLOADS, "prefixtune-readers")
        self._file_threads = FairThreads(_THREADS, "prefixtune-files")

    @functools.cached_property
    def files(self) -> FileStore:
        """The uploaded files."""
        from prefixtune.jobs.files import FileStore

        return FileStore(self.folder)

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

    def may_see(self, owner: str, caller: Caller) -> bool:
        """Whether somebody may see and change what belongs to an owner."""
        return owner == caller.name or self.sees_all(caller)

    async def read(self, work: Callable[[], T], tenant: str) -> T:
        """Do something with an uploaded file that may take minutes, in a thread."""
        return await self._readers.run(tenant, work)

    async def look(self, work: Callable[[], T], tenant: str) -> T:
        """Do something short with files, in a thread."""
        return await self._file_threads.run(tenant, work)

    async def ask(self, work: Callable[[JobQueue], T], tenant: str = "", *, changes: bool = False) -> T:
        """Do something with the queue, in a thread.

        What was begun is done, even if the client disconnects or the time is over.

        Args:
            work: Called with the queue.
            tenant: Who asks; one that asks for much, or for what takes long, does not delay the others.
            changes: Whether doing it twice is not the same as doing it once: where it may have been done, clients are
                told not to try again by themselves.

        Raises:
            ApiError: The database is away or locked, the data folder cannot be used, or too many requests of the tenant
                wait.
        """
        if self._waiting[tenant] >= _MOST_WAITING:
            raise unavailable("too many requests wait for the database of jobs.", "busy", retry_after=2)
        future = asyncio.wrap_future(self._threads.submit(tenant, lambda: work(self._open_queue())))
        # Counted once it is certain that it ends.
        self._waiting[tenant] += 1
        future.add_done_callback(partial(self._note_done, tenant))
        try:
            async with asyncio.timeout(_SECONDS):
                return await asyncio.shield(future)
        except TimeoutError:
            if changes:
                raise _outcome_unknown("does not answer") from None
            raise _away("does not answer") from None
        except QueueUnavailableError as error:
            log("queue_unavailable", level=logging.WARNING, reason=error.message)
            if changes and isinstance(error, OutcomeUnknownError):
                raise _outcome_unknown("went away meanwhile") from None
            raise _away("cannot be reached") from None

    def _note_done(self, tenant: str, future: asyncio.Future[Any]) -> None:
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        # Nobody may wait for it any more, and asyncio would complain.
        if not future.cancelled():
            future.exception()

    def _open_queue(self) -> JobQueue:
        """The queue; a failure is tried again by the next request.

        Raises:
            QueueUnavailableError: The database cannot be reached.
            ApiError: The data folder cannot be used, or it and the database do not belong together.
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
        claim_folder(self.folder, self.database_url)
        migrate(self.database_url)
        with contextlib.ExitStack() as stack:
            queue = JobQueue(self.database_url)
            stack.callback(queue.close)
            claim_database(self.folder, queue)
            stack.pop_all()
        return queue

    @contextlib.contextmanager
    def adding(self, owner: str) -> Iterator[None]:
        """Look whether an owner may add a job, and add it, while none of the servers that share the data folder does.

        Raises:
            ApiError: Others do so for too long, or the data folder cannot be changed.
        """
        path = self.folder.adding_lock(owner)
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(file_lock(path, _ADDING_SECONDS))
            except (OSError, PrefixError) as error:
                raise storage_error(error, "the job", "the data folder") from None
            if not held:
                raise unavailable(
                    "jobs of this key are being added all the time; try again later.", "busy", retry_after=2
                )
            yield

    async def remove_checkpoints(self, origin: JobOrigin | None) -> None:
        """Remove a job's own copies of its checkpoints, once its result is gone.

        Args:
            origin: Of the prefix that is gone, whatever it was.
        """
        if origin is not None and origin.step is None and is_job_id(origin.id):
            await asyncio.to_thread(remove_checkpoints, self.folder.job(origin.id))

    def has_jobs(self) -> bool:
        """Whether jobs of this server's backbone wait or run; blocks.

        A database in the data folder is not made for that.

        Raises:
            QueueUnavailableError: The database cannot be reached.
            ApiError: The data folder cannot be used.
        """
        if not self.config.database_url and not self.folder.has_database:
            return False
        return self._open_queue().has_work(self.backbone)

    async def audit(self, caller: Caller, action: str, **fields: Any) -> None:
        """As `write_audit`, in a thread."""
        await asyncio.to_thread(self.write_audit, caller, action, **fields)

    def write_audit(self, caller: Caller, action: str, **fields: Any) -> None:
        """Write down a change: a line of JSON in the data folder, and one in the log.

        Args:
            caller: Who made it.
            action: What was done, as in `job.create`.
            **fields: To what; long texts are cut.
        """
        bounded = {name: _bounded(value) for name, value in fields.items()}
        log("audit", action=action, key=caller.name, **bounded)
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "key": caller.name, "action": action}
        try:
            text = json.dumps({**line, **bounded}, ensure_ascii=True)
            append_line(self.folder.audit_log, text)
        except PrefixError as error:
            # The change has been made: the server's log has it.
            log("audit_failed", level=logging.ERROR, reason=error.message)

    def close(self) -> None:
        """Close the queue, and end the checks of files, which may take minutes."""
        self.files.close()
        for threads in (self._threads, self._readers, self._file_threads):
            threads.close()
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()


def _nobody_waits() -> None:
    """Workers look for jobs themselves."""


def _bounded(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else str(value)[:_LONGEST_FIELD]


def _away(why: str) -> ApiError:
    return unavailable(f"the database of jobs {why} now; try again later.", "queue_unavailable", retry_after=5)


def _outcome_unknown(why: str) -> ApiError:
    """Clients that try again by themselves would create a second job."""
    message = f"the database of jobs {why}; a change may have been made all the same: look before you try again."
    return unavailable(message, "queue_unavailable")
