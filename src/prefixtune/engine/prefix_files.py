"""Prefixes as files that another program reads, for as long as texts need them."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder

_MOST_NUMBERS = 2**28
"""In the files of all prefixes; beyond them, those that were not used for longest are removed."""


@dataclass(eq=False)
class PrefixFile:
    """A prefix in the folder.

    Attributes:
        prefix: The prefix.
        path: Its file.
        name: What stands for it in a request; None: it is not written.
        users: Requests that need it.
        writing: Held while it is written.
    """

    prefix: Prefix
    path: Path
    name: Any = None
    users: int = 0
    writing: threading.Lock = field(default_factory=threading.Lock)


class PrefixFiles:
    """Writes prefixes into a folder. May be used from any thread.

    Args:
        folder: Where to.
        write: Writes a prefix to a path, and returns what stands for it in a request.
    """

    def __init__(self, folder: Path, write: Callable[[Path, Prefix], Any]) -> None:
        self.folder, self._write = folder, write
        # The last used one at the end.
        self._files: dict[Prefix, PrefixFile] = {}
        self._lock = threading.Lock()

    def take(self, prefix: Prefix) -> PrefixFile:
        """Write a prefix's file if there is none; it stays until `release`.

        Raises:
            PrefixError: It cannot be written.
        """
        with self._lock:
            file = self._files.pop(prefix, None) or PrefixFile(prefix, self.folder / f"{uuid.uuid4().hex}.safetensors")
            file.users += 1
            self._files[prefix] = file
            total = sum(one.num_parameters for one in self._files)
            for old in [one for one in self._files.values() if not one.users]:
                if total > _MOST_NUMBERS:
                    total -= old.prefix.num_parameters
                    self._remove(old)
        try:
            # Outside the lock: other requests do not wait for the disk.
            with file.writing, reporting_write_errors(file.path):
                if file.name is None or not file.path.exists():
                    file.name = self._write(file.path, prefix)
        except BaseException:
            self.release(file)
            raise
        return file

    def release(self, file: PrefixFile) -> None:
        """A request that needed the file has ended."""
        with self._lock:
            file.users -= 1

    def close(self) -> None:
        """Remove all files that were written."""
        with self._lock:
            for file in list(self._files.values()):
                self._remove(file)

    def _remove(self, file: PrefixFile) -> None:
        del self._files[file.prefix]
        file.path.unlink(missing_ok=True)


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for one engine; those of processes that were killed are removed.

    Raises:
        PrefixError: The cache folder cannot be written.
    """
    parent = cache_folder() / "engines"
    with contextlib.ExitStack() as made:
        with reporting_write_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            folder = made.enter_context(work_folder(parent, "prefixes"))
        yield folder
