"""Write files so that a reader sees the old one or the new one, never a part of it.

A file is written in a hidden folder next to its final path, flushed to disk and moved. All files that matter are
written here, so that one test shows what happens when any write fails.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from prefixtune.errors import PrefixError
from prefixtune.utils.locks import acquire_lock, file_lock

__all__ = [
    "append_line",
    "atomic_files",
    "atomic_path",
    "check_writable",
    "claim_folder",
    "flush_to_disk",
    "fsync",
    "line_writer",
    "remove_abandoned",
    "reporting_write_errors",
    "work_folder",
    "write_text",
]

_LOCK = ".lock"
"""The lock's name in a work folder."""
_ATTEMPTS = 20


# --- can it be written? -----------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Check, before long work, that a file can be written there; makes nothing.

    Raises:
        PrefixError: The path is a folder, a device or a pipe, no name of a file, or its folder cannot be written.
    """
    _refuse_nul(path)
    folder = next((parent for parent in Path(path).absolute().parents if os.path.lexists(parent)), Path("/"))
    is_file = not os.path.exists(path) or os.path.isfile(path)
    can_write = os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    if not (is_file and os.path.isdir(folder) and can_write):
        reason = f"{str(folder)!r} is no folder to write to" if is_file else "it is no file"
        raise PrefixError(f"cannot write {str(path)!r}: {reason}.", hint="choose another place.")


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into one line.

    Raises:
        PrefixError: The system refuses.
    """
    hint = "free some space or choose another folder; the previous file, if any, is untouched."
    _refuse_nul(path)
    try:
        yield
    except PrefixError:
        raise
    except OSError as error:
        raise PrefixError(f"cannot write {str(path)!r}: {error.strerror or error}.", hint=hint) from error
    except Exception as error:
        # Libraries in Rust wrap the system's errors in their own.
        code = re.search(r"\(os error (\d{1,4})\)", str(error))
        if code is None:
            raise
        cause = OSError(int(code[1]), os.strerror(int(code[1])))
        raise PrefixError(f"cannot write {str(path)!r}: {cause.strerror}.", hint=hint) from cause


def _refuse_nul(path: Path) -> None:
    if "\0" in str(path):
        raise PrefixError(f"cannot write {str(path)!r}: a name has no NUL character.", hint="choose another name.")


# --- one file ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part, even after `kill -9` or a power cut. On any error the
    temporary file is removed and the old file stays.

    Args:
        path: The final file; its folder is made when missing.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    if os.path.exists(path):
        check_writable(path)
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(path.parent, path.name) as folder:
            temporary = folder / path.name
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
            fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def line_writer(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends a line to a text file; each line is flushed.

    Raises:
        PrefixError: It cannot be written.
    """
    with reporting_write_errors(path):
        handle = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(line: str) -> None:
        with reporting_write_errors(path):
            handle.write(f"{line}\n")
            handle.flush()

    try:
        yield append
    finally:
        # A failed write was reported already.
        with contextlib.suppress(OSError):
            handle.close()


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file that several processes append to; none of them loses or divides another's line.

    Raises:
        PrefixError: It cannot be written.
    """
    with reporting_write_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # After a line that a full disk or a kill has cut off.
            is_cut_off = os.lseek(descriptor, 0, os.SEEK_END) > 0 and _last_byte(descriptor) != b"\n"
            data = f"{chr(10) if is_cut_off else ''}{line}\n".encode("utf-8", "replace")
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def _last_byte(descriptor: int) -> bytes:
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1)


# --- several files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its files into `folder` when the block ends without an error.

    They replace files of the same names, in reverse order of their names; other files stay. If one cannot be moved,
    those before it are put back.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with work_folder(folder, "files") as made, work_folder(folder, "replaced") as kept:
            yield made
            names = sorted((p.relative_to(made) for p in made.rglob("*") if p.is_file()), reverse=True)
            names = [name for name in names if name != Path(_LOCK)]
            flush_to_disk(*(made / name for name in names))
            moved: list[Path] = []
            try:
                for name in names:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _keep(folder / name, kept / name)
                    os.replace(made / name, folder / name)
                    moved.append(name)
                fsync(folder)
            except BaseException:
                for name in moved:
                    _put_back(kept / name, folder / name)
                raise


def _keep(path: Path, copy: Path) -> None:
    """Keep a file that is to be replaced under a second name, if there is one."""
    if path.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            # Not every system has a second name for a file.
            shutil.copy2(path, copy)


def _put_back(copy: Path, path: Path) -> None:
    with contextlib.suppress(OSError):
        if copy.exists():
            os.replace(copy, path)
        else:
            path.unlink()


@contextlib.contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent`, `.NAME.RANDOM.tmp`, for this process only; removed when the block ends.

    Folders of that name that killed processes left are removed first.

    Raises:
        OSError: It cannot be made.
    """
    remove_abandoned(parent, name)
    for _ in range(_ATTEMPTS):
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
        with file_lock(made / _LOCK) as mine:
            try:
                # Another process may remove it as abandoned before it is locked.
                if mine and made.is_dir():
                    yield made
                    return
            finally:
                _remove(made)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(parent))


def remove_abandoned(parent: Path, name: str) -> int:
    """Remove the work folders that killed processes left; returns how many there were."""
    count = 0
    for folder in parent.glob(f".{glob.escape(name)}.*.tmp"):
        # Without its lock it has just been made, or is all but removed; whoever made it makes another one.
        with contextlib.suppress(OSError):
            folder.rmdir()
            count += 1
            continue
        lock = None
        # If it cannot be locked, it may be in use.
        with contextlib.suppress(OSError):
            if (folder / _LOCK).exists():
                lock = acquire_lock(folder / _LOCK, 0.0)
        if lock is not None:
            _remove(folder)
            lock.release()
            count += 1
    return count


def _remove(folder: Path) -> None:
    """Remove a work folder whose lock this process holds; the lock last, so that a kill leaves one to be removed."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def flush_to_disk(*paths: Path) -> None:
    """Flush files that libraries wrote to disk, and give them the permissions of any new file.

    Raises:
        OSError: One cannot be flushed.
    """
    for path in paths:
        path.chmod(_usual_mode(path.parent))
        fsync(path)


def _usual_mode(folder: Path) -> int:
    """The permissions of a new file; libraries may make theirs readable by the owner only."""
    # Of its own name: others may work in the folder, too.
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mode
    finally:
        probe.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file to disk, or a folder's names where the system can.

    Raises:
        OSError: A file cannot be flushed.
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


# --- a folder of one process ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Reserve a folder for this process while the block runs; it is made if missing.

    If nothing is written to it, folders made here are removed again.

    Raises:
        PrefixError: Another process uses it, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / _LOCK) as acquired:
            if not acquired:
                raise PrefixError(
                    f"{str(folder)!r} is in use by another process.", hint="wait for it, or choose another folder."
                )
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
