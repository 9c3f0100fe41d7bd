"""Writing files so that nothing is ever half-written: a temporary neighbour, flushed to disk, then renamed.

Knows nothing of prefixes, models or formats.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefixtune.errors import PrefixError

__all__ = ["atomic_path", "check_writable", "process_lives", "write_text"]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it onto `path` when the block ends well.

    A reader sees the old file or the new one, never a part, even after `kill -9` or a power cut. On any error the
    temporary file is removed and the old file stays.

    Args:
        path: The final file; its folder is made when missing.
    Raises:
        PrefixError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            # Left by a process that was killed while it wrote.
            if not process_lives(stale.name.split(".")[-2]):
                stale.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise PrefixError(
            f"cannot write {str(path)!r}: {error.strerror or error}.",
            hint="free some space or choose another folder; the previous file, if any, is untouched.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """See to it, before long work, that its outcome can be written; the file's folder is made when missing.

    Raises:
        PrefixError: The path is a folder, or its folder cannot be made or written.
    """
    hint = "choose another place."
    if path.is_dir():
        raise PrefixError(f"cannot write {str(path)!r}: it is a folder.", hint=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PrefixError(f"cannot write {str(path)!r}: {error.strerror or error}.", hint=hint) from error


def _umask() -> int:
    """The process's file mode mask; the system tells it only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def process_lives(process: str) -> bool:
    """Whether a process of this id runs on this machine; what a killed one left behind may go."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True
