"""What a folder of prefixes holds: files NAME.safetensors, their names, and what tells one version from the next.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from prefixtune.errors import CheckpointError, RequestError

__all__ = ["ENDING", "Signature", "check_name", "check_place", "list_names", "path_of", "signature_of"]


ENDING = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

Signature = tuple[int, int, int]
"""Time of change in nanoseconds, size in bytes, and inode: another one means another file."""


def path_of(folder: Path, name: str) -> Path:
    """Where the prefix of that name lies."""
    return folder / f"{name}{ENDING}"


def list_names(folder: Path) -> set[str]:
    """Names of all files that may be prefixes.

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(folder) as entries:
        files = [each.name for each in entries if each.name.endswith(ENDING) and not each.name.startswith(".")]
    return {name.removesuffix(ENDING) for name in files}


def signature_of(path: Path) -> Signature | None:
    """What tells a file from the one before it; None: it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_name(name: object) -> None:
    """Refuse what is no name, so that none leads out of the folder.

    Raises:
        RequestError: It is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{str(name)[:128]!r} is no name of a prefix.",
            hint="use 1 to 128 letters, digits, '.', '_' and '-', not starting with a dot.",
        )


def check_place(folder: Path, name: str) -> None:
    """Refuse what is no ordinary file of the folder.

    Raises:
        CheckpointError: It is none.
        OSError: It cannot be seen, as a link to itself cannot.
    """
    path = path_of(folder, name)
    mode = os.stat(path).st_mode
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise CheckpointError("it is a link that leads out of the folder.", hint="copy the file into the folder.")
    if not stat.S_ISREG(mode):
        raise CheckpointError("it is no ordinary file.", hint="put a file there.")
