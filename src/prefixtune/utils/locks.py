"""Locks among processes: of a file, and of a folder that one process uses alone.

A lock ends with its process, however that ends, and holds among containers that share a folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune.errors import PrefixError
from prefixtune.utils.writable import writable_folder

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["acquire_lock", "claim_folder", "describe_owner", "file_lock"]

_LOCK = ".lock"
"""The lock's name in a claimed folder."""
_OWNER = ".lock-owner"
"""The process that claimed it, for messages only; not in the lock itself, which the library may write to."""
_PATIENCE = 0.3
"""Seconds that a lock is tried for: the last holder may just be removing its file."""


@contextlib.contextmanager
def file_lock(path: Path, timeout: float = _PATIENCE) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields whether this process got the lock.

    If the file cannot be made or the system has no locks, everybody gets it: the error comes when something is written.

    Args:
        path: The file; removed with the lock.
        timeout: Most seconds to wait; below 0: without limit.

    Raises:
        PrefixError: The file exists and may not be opened, so it is unknown whether it is held.
    """
    lock, free = None, True
    try:
        lock = acquire_lock(path, timeout)
        free = lock is not None
    except PermissionError as error:
        if path.exists():
            raise PrefixError(
                f"the lock {str(path)!r} belongs to another user.",
                hint="delete it if nobody works there, or choose another folder.",
            ) from error
    except FileNotFoundError:
        # Another process has just removed the folder, and a third one that looks for locks may make it again.
        free = False
    except OSError:
        pass
    try:
        yield free
    finally:
        if lock is not None:
            # Removed while it is held: a waiting process makes a new file.
            with contextlib.suppress(OSError):
                path.unlink()
            with contextlib.suppress(OSError):
                lock.release()


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


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Reserve a folder for this process while the block runs; it is made if missing.

    If nothing is written to it, folders made here are removed again.

    Raises:
        PrefixError: Another process uses it, or it cannot be written.
    """
    with writable_folder(folder, folder), file_lock(folder / _LOCK) as acquired:
        if not acquired:
            raise PrefixError(
                f"{str(folder)!r} is in use by {describe_owner(folder / _OWNER)}.",
                hint="wait until that ends, or choose another folder.",
            )
        with _write_owner(folder / _OWNER):
            yield


@contextlib.contextmanager
def _write_owner(path: Path) -> Iterator[None]:
    """Keep the name of this process in a file while the block runs."""
    import psutil

    with contextlib.suppress(OSError, psutil.Error):
        began = psutil.Process().create_time()
        path.write_text(f"{os.getpid()}\n{platform.node()}\n{began}\n", encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def describe_owner(path: Path) -> str:
    """The process that uses a folder, as far as its owner file says."""
    import psutil

    with contextlib.suppress(OSError, ValueError, psutil.Error):
        pid, host, began = path.read_text(encoding="utf-8").split()
        if host != platform.node():
            return f"another process (on {host})"
        process = psutil.Process(int(pid))
        # A new process may have got the id of one that was killed.
        if process.create_time() == float(began):
            return f"process {process.pid} ({process.name()})"
    return "another process"
