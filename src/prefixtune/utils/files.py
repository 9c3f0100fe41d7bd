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
import stat
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import PrefixError
from prefixtune.utils.locks import acquire_lock, file_lock

# --- can it be written? -----------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Check, before long work, that a file can be written there; makes nothing.

    Raises:
        PrefixError: The path is a folder, a device or a pipe, or its folder cannot be written.
    """
    folder = next((parent for parent in Path(path).absolute().parents if os.path.lexists(parent)), Path("/"))
    is_file = True
    # Asked once: another process may remove it meanwhile. What is not there can be written.
    with contextlib.suppress(OSError):
        is_file = stat.S_ISREG(os.stat(path).st_mode)
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
    try:
        yield
    except PrefixError:
        raise
    except Exception as error:
        # Libraries in Rust wrap the system's errors in their own.
        code = re.search(r"\(os error (\d{1,4})\)", str(error))
        cause = OSError(int(code[1]), os.strerror(int(code[1]))) if code else error
        if isinstance(error, ValueError) and "\0" in str(path):
            cause = OSError(errno.EINVAL, "no file can have this name")
        if not isinstance(cause, OSError):
            raise
        raise PrefixError(
            f"cannot write {str(path)!r}: {cause.strerror or cause}.",
            hint="free some space or choose another folder; the previous file, if any, is untouched.",
        ) from cause


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


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file that several processes append to; none of them loses or divides another's line.

    Raises:
        PrefixError: It cannot be written.
    """
    with reporting_write_errors(path), open(path, "ab+", buffering=0) as file:
        # After a line that a full disk or a kill has cut off.
        is_cut_off = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        data = f"{chr(10) * is_cut_off}{line}\n".encode("utf-8", "replace")
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- several files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` when the block ends without an error.

    A new folder is there as a whole or not at all. In one that has files, each of the same name is replaced, in
    reverse order of their names, and other files stay; a process that is killed in between leaves old and new files,
    each of them whole.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    with reporting_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A folder may be another disk than the one above it.
        with work_folder(folder if folder.is_dir() else folder.parent, folder.name) as made:
            yield made
            files = sorted((path for path in made.rglob("*") if path.is_file()), reverse=True)
            flush_to_disk(*files)
            if not folder.is_dir():
                os.rename(made, folder)
            else:
                for path in files:
                    target = folder / path.relative_to(made)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
            fsync(folder)
            fsync(folder.parent)


@contextlib.contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent`, `.NAME.RANDOM.tmp`, for this process only; removed when the block ends.

    Folders of that name that killed processes left are removed first.

    Raises:
        OSError: It cannot be made.
    """
    remove_abandoned(parent, glob.escape(name))
    folder = Path(parent) / f".{name}.{secrets.token_hex(8)}.tmp"
    with file_lock(folder.with_suffix(".lock")):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, pattern: str = "*") -> int:
    """Remove the work folders that killed processes left, and locks of folders that are gone; returns how many.

    Args:
        parent: Where they are.
        pattern: Of their names, as in `work_folder`.
    """
    count = 0
    locks = {folder.with_suffix(".lock") for folder in parent.glob(f".{pattern}.*.tmp")}
    for path in locks.union(parent.glob(f".{pattern}.{'[0-9a-f]' * 16}.lock")):
        folder = path.with_suffix(".tmp")
        # If it cannot be locked, it may be in use.
        with contextlib.suppress(OSError):
            if lock := acquire_lock(path, 0.0):
                shutil.rmtree(folder, ignore_errors=True)
                path.unlink()
                lock.release()
                count += 1
    return count


def flush_to_disk(*paths: Path) -> None:
    """Flush files that libraries wrote to disk, with their folder's permissions: libraries may make theirs private.

    Raises:
        OSError: One cannot be flushed.
    """
    for path in paths:
        path.chmod(path.parent.stat().st_mode & 0o666)
        fsync(path)


def fsync(path: Path) -> None:
    """Flush a file to disk, or a folder's names where the system can.

    Raises:
        OSError: A file cannot be flushed.
    """
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
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
        with file_lock(folder / ".lock") as acquired:
            if not acquired:
                raise PrefixError(f"another process uses {str(folder)!r}.", hint="wait, or choose another folder.")
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
