"""A folder of prefixes: files NAME.safetensors, their names, and how to notice that one has changed."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.utils.files import remove_abandoned
from prefixtune.utils.locks import file_lock

ENDING = ".safetensors"
_LOCK = ".publish.lock"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

Signature = tuple[int, int, int]
"""Modification time in nanoseconds, size in bytes, and inode: where it differs, the file has changed."""


class FolderBusyError(PrefixError):
    """Others change a folder of prefixes for too long."""


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
    with file_lock(folder / _LOCK, seconds) as held:
        if not held:
            message = f"other processes have been changing the folder of prefixes for {seconds:g} seconds."
            raise FolderBusyError(message, hint="try again later.")
        yield


def path_of(folder: Path, name: str) -> Path:
    """The path of the prefix of that name."""
    return folder / f"{name}{ENDING}"


def list_names(folder: Path) -> set[str]:
    """Names of all files that may be prefixes.

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.name.endswith(ENDING) and not entry.name.startswith(".")]
    return {name.removesuffix(ENDING) for name in files}


def signature_of(file: Path | int) -> Signature | None:
    """The signature of a file, or of what a descriptor has open, whatever its path leads to by now; None: no file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def check_name(name: object) -> None:
    """Refuse names that could lead out of the folder.

    Raises:
        RequestError: It is not a valid name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{str(name)[:128]!r} is not a valid name of a prefix.",
            hint="use 1 to 128 letters, digits, '.', '_' and '-', not starting with a dot.",
        )


def check_regular_file(folder: Path, name: str) -> None:
    """Refuse what is not a regular file of the folder.

    Raises:
        CheckpointError: It is not.
        OSError: Its status cannot be read, as that of a link to itself.
    """
    path = path_of(folder, name)
    mode = os.stat(path).st_mode
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise CheckpointError("it is a link that leads out of the folder.", hint="copy the file into the folder.")
    if not stat.S_ISREG(mode):
        raise CheckpointError("it is not a regular file.", hint="put a file there.")


def remove_abandoned_copies(folder: Path) -> int:
    """Remove the unfinished files of processes that were killed while they put one there; returns how many."""
    names = {left.name[1:].rsplit(".", 2)[0] for left in folder.glob(f".*{ENDING}.*.tmp")}
    return sum(remove_abandoned(folder, name) for name in names)
