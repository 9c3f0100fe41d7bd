"""Writing files so that nothing is ever half-written: in a hidden folder beside, flushed to disk, then moved in place.

Every file that matters is written through here, so that one test can show what happens when any write fails. Locks end
with their process, however that ends, and hold among containers that share a folder. Knows nothing of prefixes, models
or formats.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune.errors import PrefixError

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "appending",
    "atomic_files",
    "atomic_path",
    "check_folder_writable",
    "check_writable",
    "claim_folder",
    "finish",
    "locked",
    "remove_abandoned",
    "sync",
    "work_folder",
    "write_text",
    "writing",
]


_LOCK = ".lock"
"""The lock's name in a folder that a process has for itself."""
_OWNER = ".lock-owner"
"""Who has it, for messages alone; beside the lock, in which the library may keep something of its own."""
_PATIENCE = 0.3
"""Seconds that a lock is tried for: its file may just have been removed by whoever had it."""
_ATTEMPTS = 20
_KEEPS_OPEN_FILES = os.name == "nt"
"""Whether the system removes no file that is open."""


# --- one file ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it onto `path` when the block ends well.

    A reader sees the old file or the new one, never a part, even after `kill -9` or a power cut. On any error the
    temporary file is removed and the old file stays.

    Args:
        path: The final file; its folder is made when missing.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(path.parent, path.name) as folder:
            temporary = folder / path.name
            yield temporary
            finish(temporary)
            os.replace(temporary, path)
            sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[str], None]]:
    """Give a function that appends a line to a text file, to be seen at once.

    Raises:
        PrefixError: It cannot be written.
    """
    with writing(path):
        handle = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(line: str) -> None:
        with writing(path):
            handle.write(f"{line}\n")
            handle.flush()

    try:
        yield append
    finally:
        # What could not be written was reported.
        with contextlib.suppress(OSError):
            handle.close()


# --- several files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Give a temporary folder, and move the files in it into `folder` when the block ends well.

    Each replaces the one of its name, in the reverse order of their names; others stay. Where one cannot be moved, what
    was there is put back, so that the files are all old or all new.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with work_folder(folder, "files") as made, work_folder(folder, "before") as before:
            yield made
            names = sorted((p.relative_to(made) for p in made.rglob("*") if p.is_file()), reverse=True)
            names = [name for name in names if name != Path(_LOCK)]
            finish(*(made / name for name in names))
            _move(names, made, folder, before)
            sync(folder)


def _move(names: list[Path], made: Path, folder: Path, before: Path) -> None:
    """Move files from one folder into another; on an error, put back what was there."""
    moved: list[Path] = []
    try:
        for name in names:
            for parent in (folder, before):
                (parent / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                # Never away from its place: a kill leaves the old one or the new one there.
                shutil.copy2(folder / name, before / name)
            os.replace(made / name, folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            if (before / name).exists():
                os.replace(before / name, folder / name)
            else:
                (folder / name).unlink()
        raise


@contextlib.contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent`, `.NAME.RANDOM.tmp`, for this process alone; gone when the block ends.

    What killed processes left of that name is removed before.

    Raises:
        OSError: It cannot be made.
    """
    remove_abandoned(parent, name)
    for _ in range(_ATTEMPTS):
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
        try:
            with locked(made / _LOCK) as mine:
                if mine and made.is_dir():
                    yield made
                    return
                # Another process took it for abandoned before it was locked.
        finally:
            shutil.rmtree(made, ignore_errors=True)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(parent))


def remove_abandoned(parent: Path, name: str) -> int:
    """Remove what killed processes left of a `work_folder`; returns how many there were."""
    count = 0
    for left in parent.glob(f".{glob.escape(name)}.*.tmp"):
        lock = None
        # Where it cannot be locked, it may be in use.
        with contextlib.suppress(OSError):
            lock = _acquire(left / _LOCK, 0.0)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
            if _KEEPS_OPEN_FILES:
                # The lock was open; if another process has it by now, it stays.
                with contextlib.suppress(OSError):
                    (left / _LOCK).unlink(missing_ok=True)
                    left.rmdir()
            count += 1
    return count


def finish(*paths: Path) -> None:
    """Bring files that others wrote to disk, with the rights of any new file.

    Raises:
        OSError: One cannot be brought there.
    """
    for path in paths:
        path.chmod(_usual_mode(path.parent))
        sync(path)


def _usual_mode(folder: Path) -> int:
    """The rights of a new file; libraries may make theirs readable by their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def sync(path: Path) -> None:
    """Bring a file to disk, or a folder's names where the system can.

    Raises:
        OSError: A file cannot be brought there.
    """
    if not path.is_dir():
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, timeout: float = _PATIENCE) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields whether it could be had.

    Where the file cannot be made or the system has no locks, everybody has it: whoever writes there meets the error.

    Args:
        path: The file; removed with the lock.
        timeout: Most seconds to wait; below 0: as long as it takes.

    Raises:
        PrefixError: The file is there and may not be opened, so that nobody knows whether it is held.
    """
    lock, free = None, True
    try:
        lock = _acquire(path, timeout)
        free = lock is not None
    except PermissionError as error:
        if path.exists():
            raise PrefixError(
                f"the lock {str(path)!r} belongs to another user.",
                hint="delete it if nobody works there, or choose another folder.",
            ) from error
    except OSError:
        pass
    try:
        yield free
    finally:
        if lock is not None:
            # While it is held: who waits for it makes another one.
            with contextlib.suppress(OSError):
                path.unlink()
            with contextlib.suppress(OSError):
                lock.release()


def _acquire(path: Path, timeout: float) -> BaseFileLock | None:
    """The lock, or None where another one has it."""
    # Not needed by whoever only reads.
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
    """Have a folder for this process alone while the block runs; it is made when missing.

    If nothing is written to it, what was made goes again.

    Raises:
        PrefixError: Another process has it, or it cannot be written.
    """
    with _writable_folder(folder, folder), locked(folder / _LOCK) as mine:
        if not mine:
            raise PrefixError(
                f"{str(folder)!r} is in use by {_holder(folder / _OWNER)}.",
                hint="wait until that ends, or choose another folder.",
            )
        with _signed(folder / _OWNER):
            yield


@contextlib.contextmanager
def _signed(path: Path) -> Iterator[None]:
    """Say in a file, while the block runs, which process this is."""
    import psutil

    with contextlib.suppress(OSError, psutil.Error):
        began = psutil.Process().create_time()
        path.write_text(f"{os.getpid()}\n{platform.node()}\n{began}\n", encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _holder(path: Path) -> str:
    """Who has a folder, as far as the file of its owner says."""
    import psutil

    with contextlib.suppress(OSError, ValueError, psutil.Error):
        number, host, began = path.read_text(encoding="utf-8").split()
        if host != platform.node():
            return f"another process (on {host})"
        process = psutil.Process(int(number))
        # Another process may have got the number of one that was killed.
        if process.create_time() == float(began):
            return f"process {process.pid} ({process.name()})"
    return "another process"


# --- before the work --------------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """See to it, before long work, that its outcome can be written; nothing stays of the try.

    Raises:
        PrefixError: The path is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise PrefixError(f"cannot write {str(path)!r}: it is a folder.", hint="choose another place.")
    with _writable_folder(path.parent, path):
        pass


def check_folder_writable(folder: Path) -> None:
    """See to it, before long work, that files can be written to a folder; nothing stays of the try.

    Raises:
        PrefixError: The path is a file, or the folder cannot be made or written.
    """
    with _writable_folder(folder, folder):
        pass


@contextlib.contextmanager
def _writable_folder(folder: Path, wanted: Path) -> Iterator[None]:
    """Make a folder and try to write to it; what was made and is empty when the block ends is removed.

    Args:
        folder: With its parents.
        wanted: What is to be written there, for messages.

    Raises:
        PrefixError: It cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                # A full disk shows in the first byte.
                file.write(b"0")
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
            raise PrefixError(f"cannot write {str(wanted)!r}: {reason}.", hint="choose another place.") from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report what goes wrong while a file is written, in one line.

    Raises:
        PrefixError: The system refuses.
    """
    hint = "free some space or choose another folder; the previous file, if any, is untouched."
    try:
        yield
    except PrefixError:
        raise
    except OSError as error:
        raise PrefixError(f"cannot write {str(path)!r}: {error.strerror or error}.", hint=hint) from error
    except Exception as error:
        # Libraries in Rust wrap the system's errors into some of their own.
        found = re.search(r"\(os error (\d{1,4})\)", str(error))
        if found is None:
            raise
        cause = OSError(int(found[1]), os.strerror(int(found[1])))
        raise PrefixError(f"cannot write {str(path)!r}: {cause.strerror}.", hint=hint) from cause
