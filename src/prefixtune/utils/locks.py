"""Locks among processes: each ends with its process, however that ends, and also holds among containers."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune.errors import PrefixError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_OTHER_DISK = "use a folder on a local disk, or on NFS 4."


@contextlib.contextmanager
def file_lock(path: Path, timeout: float = 0.3) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields whether this process got the lock.

    If the file cannot be made or the system has no locks, everybody gets it: the error comes when something is written.

    Args:
        path: The file; removed with the lock.
        timeout: Most seconds to wait, as the last holder may just be removing its file; below 0: without limit.

    Raises:
        PrefixError: The file exists and may not be opened, so it is unknown whether it is held.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = acquire_lock(path, timeout)
            free = lock is not None
        except OSError as error:
            if isinstance(error, PermissionError) and path.exists():
                raise PrefixError(
                    f"the lock {str(path)!r} belongs to another user.",
                    hint="delete it if nobody works there, or choose another folder.",
                ) from error
            # Where its folder is missing, another process has just removed that.
            lock, free = None, not isinstance(error, FileNotFoundError)
        if lock is not None:
            stack.callback(lock.release)
            # Removed while it is held: a waiting process makes a new file.
            stack.callback(path.unlink, missing_ok=True)
        yield free


def acquire_lock(path: Path, timeout: float) -> BaseFileLock | None:
    """The lock, or None if another process holds it.

    Raises:
        OSError: The file cannot be made or opened, or the system has no locks.
    """
    # Imported here: commands that only read do without it.
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return None
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, str(error)) from error
    return lock


def check_locks(folder: Path) -> None:
    """Refuse a folder on a disk where each process would get the lock that another one holds.

    Raises:
        PrefixError: There are no locks, or they hold nobody off.
    """
    path = folder / f".{uuid.uuid4().hex}.lock"
    try:
        locks = [acquire_lock(path, 0.0) for _ in range(2)]
    except OSError as error:
        raise PrefixError(f"a lock in {str(folder)!r} fails: {error}.", hint=_OTHER_DISK) from error
    for lock in filter(None, locks):
        lock.release()
    path.unlink(missing_ok=True)
    if locks[1] is not None:
        raise PrefixError(f"locks in {str(folder)!r} hold nobody off: its disk has no flock.", hint=_OTHER_DISK)


class FolderBusyError(PrefixError):
    """A folder of prefixes cannot be changed now."""


@contextlib.contextmanager
def change_folder(folder: Path, seconds: float) -> Iterator[None]:
    """Change a folder alone: of all processes, one at a time looks whose a file is and then replaces or removes it.

    Args:
        folder: Made if it is missing.
        seconds: Most to wait for the others.

    Raises:
        FolderBusyError: They take longer.
        PrefixError: The lock belongs to another user.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / ".publish.lock", seconds) as held:
        if not held:
            message = f"other processes have been changing this folder for {seconds:g} seconds."
            raise FolderBusyError(message, hint="try again later.")
        yield
