"""Whether a file or folder can be written, checked before long work; and one-line errors for writes that fail."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import PrefixError

__all__ = ["check_no_device", "check_writable", "reporting_write_errors", "writable_folder"]


_ATTEMPTS = 3
"""How often a folder is made that another process takes away again."""


def check_writable(path: Path) -> None:
    """Check, before long work, that a file can be written; leaves nothing behind.

    Raises:
        PrefixError: The path is a folder, or its folder cannot be made or written.
    """
    # Unlike Path.is_dir, it returns False where nobody may look; what is there cannot be written either.
    if os.path.isdir(path):
        raise PrefixError(f"cannot write {str(path)!r}: it is a folder.", hint="choose another place.")
    check_no_device(path)
    with writable_folder(path.parent, path):
        pass


def check_no_device(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, such as /dev/null.

    Raises:
        PrefixError: It is one, or a link to one.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise PrefixError(
            f"cannot write {str(path)!r}: it is a device or a pipe, which a file would replace.",
            hint="name a file, or leave the option out.",
        )


@contextlib.contextmanager
def writable_folder(folder: Path, wanted: Path) -> Iterator[None]:
    """Make a folder and try to write to it; folders made here that are empty when the block ends are removed.

    Args:
        folder: Made with its parents.
        wanted: The path to name in messages.

    Raises:
        PrefixError: It cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            _try_to_write(folder)
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
            raise PrefixError(f"cannot write {str(wanted)!r}: {reason}.", hint="choose another place.") from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _try_to_write(folder: Path) -> None:
    """Make a folder and write a byte to it.

    Raises:
        OSError: The system refuses.
    """
    for attempt in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                # A full disk shows in the first byte.
                file.write(b"0")
            return
        except (FileExistsError, FileNotFoundError):
            # Another process that tried the same folder has just removed it again.
            if os.path.isfile(folder) or attempt == _ATTEMPTS - 1:
                raise


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into one line.

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
        # Libraries in Rust wrap the system's errors in their own.
        code = re.search(r"\(os error (\d{1,4})\)", str(error))
        if code is None:
            raise
        cause = OSError(int(code[1]), os.strerror(int(code[1])))
        raise PrefixError(f"cannot write {str(path)!r}: {cause.strerror}.", hint=hint) from cause
