"""Write files so that a reader sees the old one or the new one, never a part of it.

A file is written in a hidden folder next to its final path, flushed to disk and moved. All files that matter are
written here, so that one test shows what happens when any write fails.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from prefixtune.utils.locks import acquire_lock, file_lock
from prefixtune.utils.writable import check_no_device, reporting_write_errors

__all__ = [
    "append_line",
    "atomic_files",
    "atomic_path",
    "flush_to_disk",
    "fsync",
    "line_writer",
    "remove_abandoned",
    "work_folder",
    "write_text",
]

_LOCK = ".lock"
"""The lock's name in a work folder."""
_LOCK_SECONDS = 5.0
"""Longest wait for another process that renames a full file."""
_ATTEMPTS = 20
_KEEPS_OPEN_FILES = os.name == "nt"
"""Whether the system removes no file that is open."""


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
    check_no_device(path)
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


def append_line(path: Path, line: str, *, max_bytes: int = 0, max_old: int = 1) -> None:
    """Append a line to a text file that several processes append to; none of them loses or divides another's line.

    Args:
        path: The file; made if it is missing.
        line: Without its end.
        max_bytes: A file that has so many or more becomes `NAME.1`, an older one `NAME.2`, and so on; 0: it grows.
        max_old: How many old ones are kept.

    Raises:
        PrefixError: It cannot be written, or not be renamed; a line that was written stays.
    """
    with reporting_write_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            # After a line that a full disk or a kill has cut off.
            is_cut_off = size > 0 and _last_byte(descriptor) != b"\n"
            data = f"{chr(10) if is_cut_off else ''}{line}\n".encode("utf-8", "replace")
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        if max_bytes and size + len(data) >= max_bytes:
            _rename_full(path, max_bytes, max_old)


def _last_byte(descriptor: int) -> bytes:
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1)


def _rename_full(path: Path, max_bytes: int, max_old: int) -> None:
    """Rename a full file and the older ones; whoever has it open still writes to it."""
    with file_lock(path.with_name(f".{path.name}.lock"), _LOCK_SECONDS) as held:
        # Another process may have done it meanwhile; if one is at it for long, the next line tries again.
        if not held or not path.exists() or path.stat().st_size < max_bytes:
            return
        files = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, max_old + 1))]
        for newer, older in reversed(list(itertools.pairwise(files))):
            if newer.exists():
                os.replace(newer, older)


# --- several files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its files into `folder` when the block ends without an error.

    They replace files of the same names, in reverse order of their names; other files stay. If one cannot be moved, the
    old files are put back, so that all are old or all are new.

    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with work_folder(folder, "files") as made, work_folder(folder, "before") as before:
            yield made
            names = sorted((p.relative_to(made) for p in made.rglob("*") if p.is_file()), reverse=True)
            names = [name for name in names if name != Path(_LOCK)]
            flush_to_disk(*(made / name for name in names))
            _move(names, made, folder, before)
            fsync(folder)


def _move(names: list[Path], made: Path, folder: Path, before: Path) -> None:
    """Move files from one folder into another; on an error, put the old files back."""
    moved: list[Path] = []
    try:
        for name in names:
            for parent in (folder, before):
                (parent / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                # Copied, not moved: a kill leaves the old file or the new one there.
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
    """A hidden folder in `parent`, `.NAME.RANDOM.tmp`, for this process only; removed when the block ends.

    Folders of that name that killed processes left are removed first.

    Raises:
        OSError: It cannot be made.
    """
    remove_abandoned(parent, name)
    for _ in range(_ATTEMPTS):
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
        try:
            with file_lock(made / _LOCK) as mine:
                if mine and made.is_dir():
                    yield made
                    return
                # Another process removed it as abandoned before it was locked.
        finally:
            shutil.rmtree(made, ignore_errors=True)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(parent))


def remove_abandoned(parent: Path, name: str) -> int:
    """Remove the work folders that killed processes left; returns how many there were."""
    count = 0
    for left in parent.glob(f".{glob.escape(name)}.*.tmp"):
        lock = None
        # If it cannot be locked, it may be in use.
        with contextlib.suppress(OSError):
            lock = acquire_lock(left / _LOCK, 0.0)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
            if _KEEPS_OPEN_FILES:
                # The lock's file was open until now; if another process holds it meanwhile, it stays.
                with contextlib.suppress(OSError):
                    (left / _LOCK).unlink(missing_ok=True)
                    left.rmdir()
            count += 1
    return count


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
